"""A fixed budget of the properties, the same examples every time; `make fuzz` draws fresh ones."""

import pytest
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES

BUDGET = settings(
    derandomize=True,
    database=None,
    deadline=None,  # the first example of a signature compiles
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("check", PROPERTIES)
def test_holds(check):
    arguments, share = PROPERTIES[check]
    settings(BUDGET, max_examples=10 * share)(given(**arguments)(check))()
