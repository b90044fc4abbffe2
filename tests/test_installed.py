"""Beside another package `tops`: what is installed leaves it alone, and works as a copy inside of it.

Every run is a process of its own, in this environment, where the package is installed with its plugin.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tops.cpu.kda

pytestmark = pytest.mark.unoptimized


def kit(function):
    return ["--pyargs", "tops.cpu.kda.testing", "--kda-impl", function, "--kda-case", "one_token"]


def run_pytest(cwd, *options, python=(), **env):
    command = [sys.executable, *python, "-m", "pytest", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture
def project(tmp_path):
    """A project that has a regular package `tops`, and a test of it."""
    files = {
        "tops/__init__.py": "NAME = 'theirs'\n",
        "tops/cpu/__init__.py": "",
        "conftest.py": "import sys\n\nassert 'tops' not in sys.modules\n",
        "tests/test_theirs.py": "import tops.cpu\n\n\ndef test_theirs(pytestconfig):\n"
        "    assert tops.NAME == 'theirs'\n    assert pytestconfig.option.kda_impl is None\n",
    }
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "project"


def test_a_project_that_is_installed_editable(project):
    """Its folder is on Python's path; the run is started elsewhere."""
    out = run_pytest(project.parent, "project/tests", python=["-P"], PYTHONPATH=str(project))
    assert "1 passed" in out


@pytest.mark.parametrize("python", [[], ["-P"]], ids=["python -m pytest", "pytest"])
def test_a_project_that_is_the_working_directory(project, python):
    """`python -m` puts it on Python's path at the start, `pytest` when it has loaded the plugins."""
    assert "1 passed" in run_pytest(project, python=python)


def test_alone(tmp_path):
    assert "one_token-o" in run_pytest(tmp_path, *kit("tops.cpu.kda:chunk_kda"), "--collect-only")


def test_a_copy_of_the_folder_in_a_project(project):
    """The package, the kit and the plugin, where nothing of ours is installed."""
    shutil.copytree(Path(tops.cpu.kda.__file__).parent, project / "tops" / "cpu" / "kda")
    (project / "conftest.py").write_text("pytest_plugins = ['tops.cpu.kda.testing.plugin']\n")
    (project / "candidate.py").write_text(
        "import tops\nfrom tops.cpu.kda import chunk_kda\n\nassert tops.NAME == 'theirs'\n"
        f"assert {str(project)!r} in chunk_kda.__code__.co_filename\n"
    )
    assert "2 passed" in run_pytest(project, *kit("candidate:chunk_kda"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
