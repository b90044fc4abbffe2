"""The faults of `make mutants` still are faults of the present source; whether the suite sees them, it tells."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize(("file", "old", "new", "what"), MUTANTS)
def test_its_text_stands_once(file, old, new, what):
    assert (ROOT / "src/tops/cpu/kda" / file).read_text().count(old) == 1
    assert new != old
