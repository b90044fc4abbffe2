"""What the README shows runs as printed."""

import re
from pathlib import Path

import pytest

from tops.cpu.kda.testing import check

pytestmark = pytest.mark.unoptimized
EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_example_runs(example):
    names = {}
    exec(example, names)
    assert names["o"].shape == names["v"].shape


def test_readme_has_an_example():
    assert EXAMPLES


WALK = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "conformance.md").read_text(), re.DOTALL
)


def test_conformance_walk_finds_the_fault():
    """The broken kernel passes a hand-picked tolerance and two cases, and its state is off in the third."""
    names = {}
    exec(WALK[0], names)
    report = check(names["chunk_kda_fwd"], "dense,weak,uneven", "bfloat16")
    assert report.first_bad_stage == "3 state"
    assert {row.case for row in report.rows if not row.ok} == {"uneven"}


def test_conformance_example_runs():
    exec(WALK[1], {})


ROOT = Path(__file__).parents[1]
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
WORDS = set(re.findall(r"\w+", SOURCE))


@pytest.mark.parametrize("page", ["algorithm", "xla"])
def test_names_in_backticks_are_names_of_the_source(page):
    """Whole identifiers, and files of the package; formulas are not looked for."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    names = set(re.findall(r"`([A-Za-z_][\w.]+(?:/\w+\.py)?|one_chunk/)`", text))
    files = {name for name in names if name.endswith(".py")}
    package = ROOT / "src" / "tops" / "cpu" / "kda"
    assert files
    assert {name for name in files if not (package / name).exists() and not (ROOT / name).exists()} == set()
    # An index is none of the name; names of JAX are JAX's.
    parts = {
        re.sub("_[ij0]$", "", name.strip("/").split(".")[-1]) for name in names - files if name[:4] != "jax."
    }
    assert parts - WORDS == set()
