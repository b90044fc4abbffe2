"""The conformance kit passes right kernels, however they sum their gates.

`right.py` has them, in NumPy: nothing but the kit's goldens is compiled. The bound is the kit's multiple, 2.
"""

import itertools

import pytest
import right

from tops.cpu.kda.testing import CATALOGUE, check

pytestmark = pytest.mark.unoptimized
slow = pytest.mark.slow
SEEDS = 20
# 30 % of the gates far below -5, or -inf: a cumulative sum loses the rest to float32.
NOT_TO_SUM = ("masks", "packed_masks", "resets", "strong")
KERNELS = list(itertools.product(right.SUMS, right.UNITS, ("stages", 16, 32, 64, 128)))


def assert_passes(name, seed, kernels):
    case = CATALOGUE[name]
    for total, unit, chunk in kernels:
        stages = chunk == "stages"
        if not (case.raw and stages):
            kernel = right.kernel(right.SUMS[total], unit, chunk, stages=stages)
            report = check(kernel, case, stages=stages, arrays="numpy", seed=seed)
            wrong = [str(row) for row in report.rows if not row.ok]
            assert not wrong, (total, unit, chunk, seed, wrong)


@pytest.mark.parametrize("name", ["dense", "packed", pytest.param("sigmoid", marks=slow)])
def test_passes_right_kernels(name):
    assert_passes(name, 0, KERNELS[::4])


@slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("sigmoid", "packed_raw") else pytest.mark.long)
        for name, case in CATALOGUE.items()
        if not case.bits
    ],
)
def test_passes_right_kernels_on_every_draw(name):
    """Token by token, and two kernels of sums a seed, other ones for every seed."""
    assert_passes(name, 1, [("in_order", "nats", 1)])
    for seed in range(1, 1 + (0 if name in NOT_TO_SUM else SEEDS)):
        assert_passes(name, seed, KERNELS[seed % 22 :: 22])


@pytest.mark.parametrize("name", ["masks", pytest.param("packed_masks", marks=slow)])
@pytest.mark.parametrize("total", right.SUMS)
def test_gates_of_minus_1000_are_not_for_a_sum(name, total):
    """A kernel that sums them exceeds the yardstick a hundredfold."""
    report = check(right.kernel(right.SUMS[total], "log2_before"), name, arrays="numpy")
    assert max(row.ratio for row in report.rows) > 100
