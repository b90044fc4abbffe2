"""What the README shows runs as printed."""

import re
from pathlib import Path

import pytest

from tops.cpu.kda.testing import check

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
