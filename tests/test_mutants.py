"""The faults of `make mutants` are faults of the source as it is; whether the suite sees them, that tells."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize(("file", "old", "new", "what"), MUTANTS)
def test_its_text_stands_once(file, old, new, what):
    assert (ROOT / "src/tops/cpu/kda" / file).read_text().count(old) == 1
    assert new != old
