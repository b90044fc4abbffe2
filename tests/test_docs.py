"""What the README shows runs as printed."""

import re
from pathlib import Path

import pytest

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
