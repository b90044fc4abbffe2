"""The kernel and its gradients held to the kit, where a chunked kernel goes wrong.

`check(chunk_kda_fwd)` and `check(chunk_kda, gradients=True)` run the whole catalogue.
"""

import jax.numpy as jnp
import pytest
from pallas_kda import chunk_kda, chunk_kda_fwd

from tops.cpu.kda.testing import Case, check
from tops.cpu.kda.testing.cases import draw

pytestmark = [pytest.mark.slow, pytest.mark.unoptimized]


OF_ONE_SHAPE = ("dense", "uneven", "masks", "resets", "equal_keys")
CASES = [*(("float32", case) for case in OF_ONE_SHAPE), ("float32", "packed_short"), ("bfloat16", "dense")]


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_stages(dtype, case):
    report = check(chunk_kda_fwd, case, dtype)
    assert report.ok, str(report)


def test_declines_what_it_does_not_do():
    arrays = (jnp.asarray(x) for x in draw(T=10, H=1, K=16))
    with pytest.raises(NotImplementedError, match="state_v_first"):
        chunk_kda_fwd(*arrays, scale=1.0, state_v_first=True)


def test_gradients():
    """Of a small call, whose programs compile fast: resets, packed, with an empty sequence and padding."""
    sizes = dict(B=1, T=60, H=1, HV=2, K=16, V=24, chunk_size=16)
    case = Case("small", "for the interpreter", "resets", **sizes, cu_seqlens=(0, 20, 20, 45))
    report = check(chunk_kda, [case], gradients=True)
    assert report.ok, str(report)
