"""The conformance kit on FLA's own kernels: passed where they are sound, and what is off where not."""

import functools

import jax.numpy as jnp
import kernels
import numpy as np
import pytest

from tops.cpu.kda.testing import Case, check
from tops.cpu.kda.testing.arrays import to_kind, to_numpy

slow = pytest.mark.slow


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


def of_torch(op):
    """With the parameters of op, on torch's tensors."""

    @functools.wraps(op)
    def run(**inputs):
        with np.errstate(all="ignore"):
            return op(**inputs)

    return run


@pytest.mark.parametrize(
    ("op", "dtype", "cases"),
    [
        (kernels.backward.chunk_kda_bwd, "float16", "one_token"),
        pytest.param(kernels.backward.chunk_kda_bwd, "float32", "one_over,packed_short", marks=slow),
        pytest.param(kernels.backward.chunk_kda_bwd, "float16", "one_over,packed_short", marks=slow),
        pytest.param(kernels.kda.chunk_kda, "float32", "one_over,packed_short", marks=slow),
        pytest.param(kernels.kda.chunk_kda, "float16", "one_token", marks=slow),
    ],
)
def test_passes_fla_s_gradients(op, dtype, cases):
    """Its backward on our saved fields, and torch's autograd through it."""
    report = check(of_torch(op), cases, dtype, gradients=True, arrays="torch")
    assert report.ok, str(report)
    assert not report.declined


def test_says_why_fla_is_off_on_masks():
    """30 % of the gates -1000: its cumulative sum is right, what it takes from it is not."""
    case = Case("short_masks", "for the interpreter", "masks", B=1, T=70, H=1, HV=2)
    report = check(fla, [case], "float32", arrays="torch")
    assert report.first_bad_stage == "1 intra"
    assert next(row.ok for row in report.rows if row.tensor == "g")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int32"])
def test_an_array_as_torch_s_and_back_is_the_same_bits(dtype):
    """For all that 16 bits can be, signalling NaNs too: what a kernel leaves unwritten may be anything."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = bits.view(jnp.dtype(dtype)) if jnp.dtype(dtype).itemsize == 2 else bits.astype(dtype)
    tensor = to_kind(x, "torch")
    assert str(tensor.dtype) == f"torch.{dtype}"
    back = to_numpy(tensor.requires_grad_(tensor.is_floating_point()))
    assert back.dtype == x.dtype
    assert back.tobytes() == x.tobytes()
