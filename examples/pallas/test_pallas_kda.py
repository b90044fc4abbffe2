"""The kernel held to the kit, stage by stage, where a chunked kernel goes wrong; its gradients to our own.

`check(chunk_kda_fwd)` runs the whole catalogue.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas_kda import chunk_kda, chunk_kda_fwd

from tops.cpu import kda
from tops.cpu.kda.testing import check
from tops.cpu.kda.testing.cases import draw

pytestmark = [pytest.mark.slow, pytest.mark.unoptimized]


CASES = [
    *(
        ("float32", case) for case in ("dense", "uneven", "masks", "resets", "equal_keys")
    ),  # one program for all
    ("float32", "packed_short"),
    ("bfloat16", "dense"),
]


@pytest.mark.parametrize(("dtype", "case"), CASES)
def test_stages(dtype, case):
    report = check(chunk_kda_fwd, case, dtype)
    assert report.ok, str(report)


def test_declines_what_it_does_not_do():
    arrays = (jnp.asarray(x) for x in draw(T=10, H=1, K=16))
    with pytest.raises(NotImplementedError, match="state_v_first"):
        chunk_kda_fwd(*arrays, scale=1.0, state_v_first=True)


@pytest.mark.parametrize("regime", ["logsigmoid", "resets"])
def test_gradients(regime):
    """Within 1e-5 of `tops.cpu.kda.chunk_kda`'s, which the suite holds to 10 times the recurrence's error."""
    arrays = draw(regime, T=50, H=2, HV=4, K=32, V=24)
    weights = np.random.default_rng(0).standard_normal((1, 50, 4, 24), np.float32)
    options = dict(output_final_state=True, cu_seqlens=np.array([0, 20, 20, 45]), chunk_size=16)

    def gradients(op):
        def loss(*arrays):
            o, S = op(*arrays, scale=32**-0.5, **options)
            return jnp.sum(weights * o) + jnp.sum(S)

        return jax.grad(loss, argnums=range(5))(*map(jnp.asarray, arrays))

    for mine, golden in zip(gradients(chunk_kda), gradients(kda.chunk_kda), strict=True):
        assert jnp.linalg.norm(mine - golden) <= 1e-5 * jnp.linalg.norm(golden)
