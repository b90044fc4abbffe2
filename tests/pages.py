"""A page's blocks of code, run in their order, as its reader would.

Python is run in one namespace. What starts with `# name.py` is that file instead. A `console` block is
commands behind "$ ", each with the output that it must have: numbers may be others, and a line "..." stands
for any lines.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page, languages="python|console"):
    """[(language, text)] of a page of the repository."""
    return re.findall(rf"^```({languages})\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run_page(page, folder):
    """Runs a page in a folder; returns what its Python has defined."""
    names = {}
    for language, text in blocks(page):
        if language == "console":
            run_commands(text, folder)
        elif name := re.match(r"# (\w+\.py)\n", text):
            (folder / name[1]).write_text(text)
        else:
            exec(text, names)
    return names


def run_commands(text, folder):
    for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
        command = re.sub(r"(?<!\S)python ", f"{sys.executable} ", command)
        env = os.environ | dict(PYTEST_ADDOPTS="-p no:cacheprovider")
        run = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
        found = f"{command}\n{run.stdout}\n{run.stderr}"
        assert run.returncode == (1 if "NOT OK" in expected else 0), found
        assert re.fullmatch(pattern(expected), run.stdout.strip()), found


NUMBER = r"\d[\d.]*(?:e[+-]?\d+)?"


def pattern(expected):
    """Of an output like `expected`."""
    lines = []
    for line in expected.strip().splitlines():
        words = [NUMBER.join(map(re.escape, re.split(NUMBER, word))) for word in line.split()]
        lines.append(r"[\s\S]*" if line == "..." else r"[ \t]*" + r"[ \t]+".join(words))
    return r"\n".join(lines).replace(r"\n[\s\S]*", r"[\s\S]*")
