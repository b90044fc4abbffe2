"""What the README and the documents show runs as printed."""

import re
from pathlib import Path

import numpy as np
import pytest
from pages import blocks, pattern, run_commands, run_page

import tops.cpu.kda
from tops.cpu.kda import testing

pytestmark = pytest.mark.unoptimized
ROOT = Path(__file__).parents[1]
WALK = [text for _, text in blocks("docs/conformance.md", "python")]
# Pages with tests of their own: what they show needs more than a run, or torch (`fla/test_pages.py`).
APART = {"conformance", "pallas", "test_triton"}
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if blocks(path) and path.stem not in APART)


def test_readme_runs():
    """The test of a kernel on one case; the rest as it is."""
    test, use = (text for _, text in blocks("README.md"))
    names = {}
    exec(test, names)
    names["test_my_kernel"]("one_token")
    exec(use, names)
    assert names["o"].shape == names["v"].shape


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path):
    names = run_page(f"docs/{page}.md", tmp_path)
    if "o" in names:
        assert np.isfinite(names["o"]).all()
    if page == "padding":
        tokens = names["by_mask"][names["mask"]]
        np.testing.assert_allclose(names["o"][0, : len(tokens)], tokens, rtol=0, atol=1e-5)


def unindented(code):
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


@pytest.mark.slow
def test_worked_example(tmp_path):
    """What the page shows of the kernel is the kernel's, its fault is found, and without it all is well."""
    source = (ROOT / "examples" / "pallas" / "pallas_kda.py").read_text()
    ((_, fault),) = blocks("docs/pallas.md", "diff")
    right, wrong = (line[1:] for line in fault.splitlines())
    assert source.count(right) == 1
    (tmp_path / "pallas_kda.py").write_text(source)
    (tmp_path / "broken.py").write_text(source.replace(right, wrong))
    for language, text in blocks("docs/pallas.md"):
        if language == "python":
            assert unindented(text) in unindented(source)
        else:
            run_commands(text, tmp_path)


def test_what_is_public_is_on_a_page():
    """Of the ops and of the kit, so that no docstring is left out of the site."""
    text = (ROOT / "docs" / "api.md").read_text()
    names = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)}
    assert set(tops.cpu.kda.__all__) | {"assert_right", "check", "Report"} <= names


@pytest.mark.slow
def test_conformance_walk_finds_the_fault():
    """The broken kernel passes a hand-picked tolerance and two cases, and its state is off in the third."""
    names = {"__name__": "broken"}
    exec(WALK[0], names)
    report = testing.check(names["chunk_kda_fwd"], "dense,weak,uneven", "bfloat16")
    assert report.first_bad_stage == "3 state"
    shown = re.search(r"^```\n(NOT OK.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    assert re.fullmatch(pattern(shown), str(report))
    assert {row.case for row in report.rows if not row.ok} == {"uneven"}


@pytest.mark.slow
def test_conformance_backward_by_stages():
    """The stages by hand make what the whole makes."""
    names = {}
    exec(WALK[1], names)
    for name in ("dq", "dk", "dv", "db", "dg"):
        np.testing.assert_allclose(names[name], getattr(names["whole"], name), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_conformance_example_runs():
    exec(WALK[2], {})


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
    assert shown in (ROOT / "peers" / "libraries.py").read_text()
    for function in shown.strip().split("\n\n\n"):
        lines = [line for line in function.splitlines()[1:] if line.strip()]
        assert len(lines) <= 8, function
