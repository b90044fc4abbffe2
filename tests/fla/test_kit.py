"""The conformance kit on FLA's own kernels: passed where they are sound, and what is off where not."""

import functools

import kernels
import numpy as np
import pytest

from tops.cpu.kda.testing import Case, check


@functools.wraps(kernels.forward.chunk_kda_fwd)
def fla(**inputs):
    with np.errstate(all="ignore"), kernels.torch.no_grad():  # lanes that are masked away overflow
        return kernels.forward.chunk_kda_fwd(**inputs)


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("float32", "one_token,one_over,chunk_32,packed_short"), ("float16", "one_over,packed_short")],
)
def test_passes_fla(dtype, cases):
    report = check(fla, cases, dtype, arrays="torch")
    assert report.ok, str(report)
    assert not report.declined


def test_says_why_fla_is_off_on_masks():
    """30 % of the gates -1000: its cumulative sum is right, what it takes from it is not."""
    case = Case("short_masks", "for the interpreter", "masks", B=1, T=70, H=1, HV=2)
    report = check(fla, [case], "float32", arrays="torch")
    assert report.first_bad_stage == "1 intra"
    assert next(row.ok for row in report.rows if row.tensor == "g")
