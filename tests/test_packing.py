"""Packing and causality to the last bit, and one compilation for every packing."""

import jax
import numpy as np
import pytest
from inputs import draw
from oracle import relative_error

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, naive_recurrent_kda

slow = pytest.mark.slow
T = 320
LENGTHS = [70, 0, 1, 70, 0]  # 179 tokens of padding follow
CU_SEQLENS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)


def packed_inputs(dtype=np.float32, regime="weak", HV=4):
    inputs = draw(regime, T=T, H=2, HV=HV, K=32, V=24, dtype=dtype)
    states = np.random.default_rng(1).standard_normal((len(LENGTHS), HV, 32, 24)).astype(np.float32)
    return inputs, states


@pytest.mark.parametrize(
    ("dtype", "chunk_size"),
    [
        (np.float32, 64),
        pytest.param(np.float64, 16, marks=slow),
        pytest.param("bfloat16", 32, marks=slow),
    ],
)
def test_packed_equals_alone(dtype, chunk_size):
    """Bit for bit: a chunk's arithmetic depends on nothing but its own tokens and state."""
    inputs, states = packed_inputs(dtype)
    o, final = chunk_kda(
        *inputs,
        initial_state=states,
        output_final_state=True,
        cu_seqlens=CU_SEQLENS,
        chunk_size=chunk_size,
    )
    for n, length in enumerate(LENGTHS):
        start = CU_SEQLENS[n]
        if length == 0:
            np.testing.assert_array_equal(final[n], states[n])
            continue
        alone = [x[:, start : start + 70] for x in inputs]  # one program for all: what follows is padding
        o_alone, final_alone = chunk_kda(
            *alone,
            initial_state=states[n : n + 1],
            output_final_state=True,
            cu_seqlens=np.array([0, length], np.int32),
            chunk_size=chunk_size,
        )
        np.testing.assert_array_equal(o[:, start : start + length], o_alone[:, :length])
        np.testing.assert_array_equal(final[n], final_alone[0])


def test_packed_equals_dense():
    inputs, states = packed_inputs()
    length = 70
    inputs = [x[:, :length] for x in inputs]
    options = dict(initial_state=states[:1], output_final_state=True)
    dense = chunk_kda(*inputs, **options)
    packed = chunk_kda(*inputs, **options, cu_seqlens=np.array([0, length], np.int32))
    for x, y in zip(packed, dense, strict=True):
        assert relative_error(x, np.asarray(y, np.float64)) <= 1e-6


def test_padding_is_zero_and_touches_nothing():
    inputs, states = packed_inputs()
    poisoned = [x.copy() for x in inputs]
    for x in poisoned:
        x[:, CU_SEQLENS[-1] :] = np.nan
    options = dict(initial_state=states, output_final_state=True, cu_seqlens=CU_SEQLENS)
    for op in (chunk_kda, naive_recurrent_kda):
        for clean, poison in zip(op(*inputs, **options), op(*poisoned, **options), strict=True):
            np.testing.assert_array_equal(clean, poison)
        assert not np.asarray(op(*poisoned, **options)[0])[:, CU_SEQLENS[-1] :].any()


@pytest.mark.parametrize("cu_seqlens", [None, CU_SEQLENS])
@pytest.mark.parametrize("t", [1, 40, 64, 65, 133])
def test_causal(t, cu_seqlens):
    """Changing every input from token t on leaves the outputs before t as they were, to the bit."""
    inputs, states = packed_inputs(regime="logsigmoid")
    others = draw("no_decay", T=T, H=2, HV=4, K=32, V=24, seed=7)
    changed = [np.concatenate([x[:, :t], y[:, t:]], axis=1) for x, y in zip(inputs, others, strict=True)]
    options = dict(initial_state=states[: None if cu_seqlens is not None else 1], output_final_state=True)
    options |= dict(cu_seqlens=cu_seqlens, chunk_size=64)
    (o, _), (o_changed, _) = chunk_kda(*inputs, **options), chunk_kda(*changed, **options)
    np.testing.assert_array_equal(o[:, :t], o_changed[:, :t])
    assert not np.array_equal(o, o_changed)


@slow
def test_appending_changes_nothing_before():
    inputs, _ = packed_inputs(regime="logsigmoid")
    t = 133
    o, _ = chunk_kda(*inputs)
    o_prefix, _ = chunk_kda(*(x[:, :t] for x in inputs))
    np.testing.assert_array_equal(o[:, :t], o_prefix)


@pytest.mark.unoptimized
def test_one_compilation_serves_every_packing():
    inputs, states = packed_inputs()
    traces = []

    @jax.jit
    def op(cu_seqlens):
        traces.append(cu_seqlens)
        return chunk_kda(*inputs, initial_state=states, output_final_state=True, cu_seqlens=cu_seqlens)

    rng = np.random.default_rng(0)
    for _ in range(5):
        cu_seqlens = np.sort(rng.integers(0, T + 1, len(LENGTHS) + 1)).astype(np.int32)
        cu_seqlens[0] = 0
        jitted = op(cu_seqlens)
        eager = chunk_kda(*inputs, initial_state=states, output_final_state=True, cu_seqlens=cu_seqlens)
        for x, y in zip(jitted, eager, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    assert len(traces) == 1
    assert op._cache_size() == 1


@pytest.mark.unoptimized
@pytest.mark.parametrize("packed", [False, True])
def test_the_program_does_not_grow(packed):
    """No loop over tokens, chunks or sequences is unrolled: the number of operations is the same."""

    def operations(T, N):
        inputs = draw(T=T, H=1, K=8)
        cu_seqlens = np.linspace(0, T, N + 1).astype(np.int32)
        options = dict(cu_seqlens=cu_seqlens) if packed else {}
        return jax.jit(chunk_kda).lower(*inputs, **options).as_text().count("\n")

    assert operations(256, 2) == operations(4096, 100)


@pytest.mark.unoptimized
@slow
def test_vmap_and_jit_agree_with_eager():
    """vmap over packed calls that differ in values and packing."""
    inputs = [np.stack(pair) for pair in zip(draw(T=100, K=8, seed=0), draw(T=100, K=8, seed=1), strict=True)]
    cu_seqlens = np.array([[0, 30, 100], [0, 99, 99]], np.int32)
    mapped = jax.vmap(lambda *x: chunk_kda(*x[:5], cu_seqlens=x[5], output_final_state=True))(
        *inputs, cu_seqlens
    )
    for i in range(2):
        row = [x[i] for x in inputs]
        eager = chunk_kda(*row, cu_seqlens=cu_seqlens[i], output_final_state=True)
        jitted = jax.jit(chunk_kda, static_argnames="output_final_state")(
            *row, cu_seqlens=cu_seqlens[i], output_final_state=True
        )
        for x, y, z in zip(mapped, eager, jitted, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-6)
            np.testing.assert_allclose(z, y, rtol=0, atol=1e-6)


@pytest.mark.unoptimized
def test_chunk_indices_make_the_number_of_chunks_exact():
    from tops.cpu.kda import prepare_chunk_indices

    inputs, _ = packed_inputs()
    indices = prepare_chunk_indices(CU_SEQLENS, 64)
    np.testing.assert_array_equal(indices, [[0, 0], [0, 1], [2, 0], [3, 0], [3, 1]])
    options = dict(return_intermediate_states=True, cu_seqlens=CU_SEQLENS)
    eager = chunk_kda_fwd(*inputs, **options)
    assert eager.h.shape[1] == len(indices)
    jitted = jax.jit(lambda *x: chunk_kda_fwd(*x, chunk_indices=indices, **options))(*inputs)
    assert jitted.h.shape == eager.h.shape
    np.testing.assert_allclose(jitted.o, eager.o, rtol=0, atol=1e-6)
