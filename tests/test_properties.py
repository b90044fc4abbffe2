"""A fixed budget of the properties, the same examples every time; `make fuzz` draws fresh ones."""

import pytest
from cases import SIGNATURES, cases
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES, against_the_oracle, every_field

BUDGET = settings(
    derandomize=True,
    database=None,
    deadline=None,  # the first example of a signature compiles
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.slow
@pytest.mark.unoptimized  # its time is compilation; `make fuzz` compiles as a user does
@pytest.mark.parametrize("check", PROPERTIES)
def test_holds(check):
    arguments, share = PROPERTIES[check]
    settings(BUDGET, max_examples=10 * share)(given(**arguments)(check))()


# One signature a dtype, one with raw gates, packed and dense.
FEW = [s for s in SIGNATURES if s.T in (97, 101, 90, 99)]
PACKED = [s for s in SIGNATURES if s.T == 70 and s.N]


@pytest.mark.unoptimized
@pytest.mark.parametrize(("check", "signatures"), [(against_the_oracle, FEW), (every_field, PACKED)])
def test_holds_for_a_few_signatures(check, signatures):
    settings(BUDGET, max_examples=16)(given(case=cases(signatures))(check))()
