"""What the site shows of the folders beside `docs`: the figures of `benchmarks`, and how to contribute."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FILES = ("benchmarks/kda.svg", "benchmarks/results.json", "CONTRIBUTING.md")


def on_files(files, config):
    for name in FILES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, **_):
    for above in ("../benchmarks/", "../CONTRIBUTING.md"):
        markdown = markdown.replace(f"]({above}", f"]({above[3:]}")
    return markdown.replace("](docs/", "](")  # from a page of the root
