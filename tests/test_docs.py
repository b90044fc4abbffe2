"""What the README shows runs as printed."""

import re
from pathlib import Path

import numpy as np
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


@pytest.mark.slow
@pytest.mark.parametrize("page", ["from_fla", "serving", "padding"])
def test_page_runs(page):
    """Its examples in one go, each with what those before it made."""
    names = {}
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    assert np.isfinite(names["o"]).all()
    if page == "padding":
        tokens = names["by_mask"][names["mask"]]
        np.testing.assert_allclose(names["o"][0, : len(tokens)], tokens, rtol=0, atol=1e-5)


def test_conformance_walk_finds_the_fault():
    """The broken kernel passes a hand-picked tolerance and two cases, and its state is off in the third."""
    names = {}
    exec(WALK[0], names)
    report = check(names["chunk_kda_fwd"], "dense,weak,uneven", "bfloat16")
    assert report.first_bad_stage == "3 state"
    assert {row.case for row in report.rows if not row.ok} == {"uneven"}


@pytest.mark.slow
def test_conformance_backward_by_stages():
    """The stages by hand make what the whole makes."""
    names = {}
    exec(WALK[1], names)
    for name in ("dq", "dk", "dv", "db", "dg"):
        np.testing.assert_allclose(names[name], getattr(names["whole"], name), rtol=0, atol=1e-5)


def test_conformance_example_runs():
    exec(WALK[2], {})


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


def test_adapters_of_other_libraries():
    """The page shows those that `make peers` runs, each of at most 8 lines."""
    (shown,) = (text for text in WALK if "def tokamax" in text)
    assert shown in (ROOT / "peers" / "kernels.py").read_text()
    for function in shown.strip().split("\n\n\n"):
        lines = [line for line in function.splitlines()[1:] if line.strip()]
        assert len(lines) <= 8, function
