"""What the site shows of the folders beside `docs`: the figures of `benchmarks`."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FIGURES = ("benchmarks/kda.svg", "benchmarks/results.json")


def on_files(files, config):
    for name in FIGURES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace("](../benchmarks/", "](benchmarks/")
