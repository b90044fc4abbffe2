"""How far the forward is from the float64 recurrence, regime by regime.

The float32 bounds are two to four times what float32 arithmetic costs the token recurrence itself there,
eight for equal keys; `test_no_worse_than_the_recurrence` holds the two together. The float64 bounds leave
two digits to rounding.
"""

from functools import cache

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inputs import REGIMES, draw
from oracle import recurrence, relative_error

from tops.cpu.kda import chunk_kda, naive_chunk_kda, naive_recurrent_kda
from tops.cpu.kda.testing.compare import ordinal

FLOAT32 = dict(
    logsigmoid=4e-7,
    weak=8e-7,
    minus_5=4e-7,
    masks=4e-7,
    resets=4e-7,
    no_decay=8e-7,
    uneven=8e-7,
    near_keys=1.5e-6,
    beta_0_1=8e-7,
    beta_2=8e-7,
    equal_keys=2e-5,
)
slow = pytest.mark.slow
# One chunk size and one seed in the fast tier: the others are programs of their own, and rarely tell more.
CHUNK_SIZES = [64, *(pytest.param(C, marks=slow) for C in (16, 32, 128))]


@cache
def truth(regime, dtype=np.float32, seed=0):
    inputs = draw(regime, dtype=dtype, seed=seed)
    return inputs, recurrence(*inputs)


def errors(op, inputs, expected, **options):
    o, final_state = op(*inputs, output_final_state=True, **options)[:2]
    return np.array([relative_error(x, y) for x, y in zip((o, final_state), expected, strict=True)])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("regime", REGIMES)
def test_float32(regime, seed, chunk_size):
    inputs, expected = truth(regime, seed=seed)
    assert (errors(chunk_kda, inputs, expected, chunk_size=chunk_size) <= FLOAT32[regime]).all()


@pytest.mark.parametrize("regime", REGIMES)
def test_no_worse_than_the_recurrence(regime):
    """Within 4 times the token recurrence in float32; 8 times for equal keys, where Akk itself cannot be
    stored any better: its exact inverse rounded to float32 errs by as much."""
    inputs, expected = truth(regime)
    recurrent = errors(naive_recurrent_kda, inputs, expected)
    factor = 8 if regime == "equal_keys" else 4
    assert (errors(chunk_kda, inputs, expected) <= factor * recurrent).all()


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("regime", REGIMES)
def test_float64(regime, chunk_size):
    inputs, expected = truth(regime, dtype=np.float64)
    bound = 1e-11 if regime == "equal_keys" else 1e-13
    assert (errors(chunk_kda, inputs, expected, chunk_size=chunk_size) <= bound).all()


@pytest.mark.parametrize("regime", REGIMES)
def test_the_oracles_agree(regime):
    """Two recurrences written apart, in numpy and in JAX, and the naive chunks: only rounding lies between
    them. Of equal keys the inverse of a chunk loses two digits."""
    inputs, expected = truth(regime, dtype=np.float64)
    assert (errors(naive_recurrent_kda, inputs, expected) <= 1e-13).all()
    bound = 1e-11 if regime == "equal_keys" else 1e-13
    assert (errors(naive_chunk_kda, inputs, expected) <= bound).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime != "equal_keys"])
def test_16_bit_outputs_are_correctly_rounded(regime, dtype):
    """o is the float64 result of the rounded inputs, rounded once, but where float32's own error reaches
    across a rounding boundary. For a relative error e of o that is about e / 2**-11 of the elements, and a
    second step needs an element that is e * 2**11 times smaller than the rest: 0.2 % and 1.3e-4 for an e of
    1e-6. So the second bound is proportional to the regime's own, 2e-4 for nearly equal keys. With equal keys
    e is 1e-5, which is why that regime is not here."""
    inputs = draw(regime, dtype=dtype)
    expected, state = recurrence(*inputs)
    o, final_state = chunk_kda(*inputs, output_final_state=True)
    assert o.dtype == dtype
    assert final_state.dtype == np.float32
    assert relative_error(final_state, state) <= FLOAT32[regime]
    steps = np.abs(ordinal(np.asarray(o)) - ordinal(expected.astype(dtype)))
    assert np.mean(steps == 0) >= 0.995
    assert np.mean(steps > 1) <= 2e-4 * FLOAT32[regime] / FLOAT32["near_keys"]


@pytest.mark.unoptimized
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "K", "V"),
    [
        pytest.param(1, 1, 1, 1, 1, 1, marks=slow),
        pytest.param(3, 65, 1, 3, 16, 1, marks=slow),
        (2, 129, 3, 6, 33, 8),
    ],
)
def test_any_shape(B, T, H, HV, K, V, packed):
    """Odd sizes, GVA, ragged tails, an initial state and a scale of one's own."""
    B = 1 if packed else B
    inputs = draw(B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=np.float64)
    cu_seqlens = np.array([0, 0, T // 3, T // 3, T]) if packed else None
    N = 4 if packed else B
    initial_state = np.random.default_rng(1).standard_normal((N, HV, K, V))
    options = dict(scale=0.7, initial_state=initial_state, cu_seqlens=cu_seqlens)
    expected = recurrence(*inputs, **options)
    for op in (chunk_kda, naive_chunk_kda, naive_recurrent_kda):
        o, final_state = op(*inputs, output_final_state=True, **options)[:2]
        np.testing.assert_allclose(o, expected[0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(final_state, expected[1], rtol=0, atol=1e-12)


@slow
def test_state_v_first_turns_the_states():
    inputs = draw(T=100, K=8, V=12, dtype=np.float64)
    initial_state = np.random.default_rng(1).standard_normal((1, 4, 8, 12))
    o, final_state = chunk_kda(*inputs, initial_state=initial_state, output_final_state=True)
    turned = chunk_kda(
        *inputs, initial_state=initial_state.swapaxes(2, 3), output_final_state=True, state_v_first=True
    )
    np.testing.assert_array_equal(turned[0], o)
    np.testing.assert_array_equal(turned[1], jnp.swapaxes(final_state, 2, 3))
