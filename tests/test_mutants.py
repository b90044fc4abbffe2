"""The faults of `make mutants` are faults of the source, and the fast tier has the tests that find them."""

import json
import subprocess
import sys

import pytest
from mutants import MUTANTS, RECORD, ROOT


def test_each_text_stands_once():
    for file, old, new, what in MUTANTS:
        assert (ROOT / "src/tops/cpu/kda" / file).read_text().count(old) == 1, what
        assert new != old, what


@pytest.mark.slow
def test_the_fast_tier_has_the_tests_that_find_them():
    record = json.loads(RECORD.read_text())
    assert list(record) == [what for *_, what in MUTANTS]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "tests"]
    tier = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {found["test"] for found in record.values()} - set(tier) == set()
