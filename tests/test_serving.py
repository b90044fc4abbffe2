"""Decoding from a pool of states, and the state after every token. float64 and 1e-12, or the same bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import draw
from oracle import recurrence

from tops.cpu.kda import fused_recurrent_kda, fused_recurrent_kda_fwd

pytestmark = pytest.mark.unoptimized
H, HV, K, V, P = 1, 2, 8, 6, 9
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def batch(B, T, seed=0, dtype=np.float64):
    return draw(B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype, seed=seed)


def pool(dtype=np.float64):
    return np.random.default_rng(1).standard_normal((P, HV, K, V)).astype(dtype)


@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_state_after_every_token(packed, state_v_first):
    """That of a call which ends there. Zero at padding."""
    ends = np.array([0, 3, 3, 4, 6]) if packed else None
    inputs, states = batch(1, 7), pool()[: 4 if packed else 1]
    options = dict(initial_state=states, cu_seqlens=ends)
    given = options | dict(initial_state=states.swapaxes(2, 3)) if state_v_first else options
    *_, h = fused_recurrent_kda(
        *inputs, **given, state_v_first=state_v_first, return_intermediate_states=True
    )
    h = h.swapaxes(-1, -2) if state_v_first else h
    assert h.shape == (1, 7, HV, K, V)
    for t in range(7):
        inside = not packed or t < ends[-1]
        n = np.searchsorted(ends[1:], t, side="right") if packed and inside else 0
        start = ends[n] if packed and inside else 0
        until = [x[:, start : t + 1] for x in inputs]
        expected = recurrence(*until, initial_state=states[n : n + 1])[1][0]
        close(h[0, t], expected if inside else np.zeros_like(expected))


def test_beta_for_each_value_channel():
    """Channel by channel it is the recurrence with that beta."""
    q, k, v, g, _ = batch(2, 5)
    beta = np.random.default_rng(2).random((2, 5, HV, V))
    o, state = fused_recurrent_kda(q, k, v, g, beta, output_final_state=True)
    for channel in range(V):
        one = slice(channel, channel + 1)
        expected = recurrence(q, k, v[..., one], g, beta[..., channel])
        close(o[..., one], expected[0])
        close(state[..., one], expected[1])


@pytest.mark.parametrize("one_axis", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_one_token_a_sequence(packed, one_axis):
    """The new states are in the slots of the old, to the bit; the other slots keep theirs. A sequence without
    a slot starts from zeros and leaves nothing."""
    slots = np.array([5, -1, 0, 7])
    inputs, states = batch(4, 1), pool()
    packing = dict(cu_seqlens=np.arange(5)) if packed else {}
    given = [x.reshape(1, 4, *x.shape[2:]) for x in inputs] if packed else inputs
    indices = slots if one_axis else slots[:, None]
    o, made = fused_recurrent_kda_fwd(*given, initial_state=states, ssm_state_indices=indices, **packing)
    start = np.where((slots >= 0)[:, None, None, None], states[slots], 0)
    expected = fused_recurrent_kda(*given, initial_state=start, output_final_state=True, **packing)
    np.testing.assert_array_equal(o, expected[0])
    for n in (0, 2, 3):
        np.testing.assert_array_equal(made[slots[n]], expected[1][n])
    np.testing.assert_array_equal(
        np.delete(made, slots[slots >= 0], 0), np.delete(states, slots[slots >= 0], 0)
    )
    same = fused_recurrent_kda_fwd(
        *given, initial_state=states, ssm_state_indices=indices, inplace_final_state=False,
        output_final_state=True, **packing,
    )  # fmt: skip
    np.testing.assert_array_equal(same[1], expected[1])


@pytest.mark.parametrize("traced", [False, True])
def test_speculative_decoding(traced):
    """Three drafted tokens a sequence, of which a verifier takes some: the next call starts behind those. An
    empty sequence leaves its slots alone."""
    slots = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    accepted, ends = np.array([1, 3, 2]), np.array([0, 3, 6, 6])
    states = np.zeros((P, HV, K, V))
    first, then = ([x.reshape(1, 6, *x.shape[2:]) for x in batch(2, 3, seed)] for seed in (0, 1))
    call = partial(fused_recurrent_kda_fwd, cu_seqlens=ends)
    if traced:
        call = jax.jit(lambda *x, **y: fused_recurrent_kda_fwd(*x, **y))
        call = partial(call, cu_seqlens=ends)
    _, states = call(*first, initial_state=states, ssm_state_indices=slots)
    o, states = call(*then, initial_state=states, ssm_state_indices=slots, num_accepted_tokens=accepted)
    for n in range(2):
        rows = slice(3 * n, 3 * n + 3)
        kept = slice(3 * n, 3 * n + accepted[n])
        taken = [np.concatenate([x[:, kept], y[:, rows]], 1) for x, y in zip(first, then, strict=True)]
        expected, last = recurrence(*taken)
        close(o[:, rows], expected[:, -3:])
        close(states[slots[n, 2]], last[0])
    assert not np.asarray(states[6:]).any()


def test_without_indices():
    """The states replace the initial ones, in their dtype; or are returned; or are not."""
    inputs = batch(2, 3, dtype=np.float32)
    states = pool(np.float32)[:2]
    o, expected = fused_recurrent_kda(*inputs, initial_state=states, output_final_state=True)
    for form, final in (
        (dict(initial_state=states), expected),
        (dict(initial_state=states, inplace_final_state=False, output_final_state=True), expected),
        (dict(initial_state=states, inplace_final_state=False), None),
    ):
        made = fused_recurrent_kda_fwd(*inputs, **form)
        np.testing.assert_array_equal(made[0], o)
        assert (made[1] is None) == (final is None)
        assert final is None or np.array_equal(made[1], final)
    narrow = jnp.asarray(states, jnp.bfloat16)
    assert fused_recurrent_kda_fwd(*inputs, initial_state=narrow)[1].dtype == jnp.bfloat16


def test_a_donated_pool_is_written_in_place():
    states = jax.ShapeDtypeStruct((P, HV, K, V), np.float32)

    def step(states, slots, *token):
        return fused_recurrent_kda_fwd(*token, initial_state=states, ssm_state_indices=slots)

    token, slots = batch(3, 1, dtype=np.float32), np.array([4, 0, 2])
    compiled = jax.jit(step, donate_argnums=0).lower(states, slots, *token).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == P * HV * K * V * 4
