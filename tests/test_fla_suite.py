"""The cases of FLA's own suite, `tests/ops/test_kda.py`: the same calls, shapes, dtypes and tolerances.

FLA's tolerance is the error's norm over the norm. The small cases are computed; of the others, which take the
token recurrence's gradient gigabytes, the calls are traced: nothing is refused, and every result and gradient
has its shape and dtype.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tops.cpu.kda import (
    chunk_kda,
    fused_kda_gate,
    fused_recurrent_kda,
    naive_chunk_kda,
    naive_kda_gate,
    naive_kda_lowerbound_gate,
    naive_recurrent_kda,
)

pytestmark = [pytest.mark.unoptimized, pytest.mark.slow]
slow = pytest.mark.slow
BOUNDS = dict(q=0.008, k=0.008, v=0.008, g=0.02, beta=0.02, initial_state=0.008, A_log=0.003, dt_bias=0.008)
LENGTHS = ([0, 256, 500, 1000], [0, 100, 300, 1200, 3000, 4096], [0, 15, 100, 300, 1200, 2000])


def arrays(B, T, H, HV, D, dtype, raw_gate=False, N=None, bias=True):
    """What FLA draws: q, k of unit norm, v and beta in `dtype`, a raw g too, the others in float32."""
    rng = np.random.default_rng(42)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = (rng.random(shape, np.float32) for shape in 2 * [(B, T, H, D)] + [(B, T, HV, D)])
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = normal(B, T, HV, D), 1 / (1 + np.exp(-normal(B, T, HV)))
    g = g.astype(dtype) if raw_gate else -np.logaddexp(0, -g)
    made = {name: x.astype(dtype) for name, x in dict(q=q, k=k, v=v, beta=beta).items()} | dict(g=g)
    made["initial_state"] = normal(N or B, HV, D, D)
    if raw_gate:
        made["A_log"] = np.log(rng.uniform(1, 16, (1, 1, HV, 1))).astype(np.float32)
        made |= dict(dt_bias=normal(HV * D)) if bias else {}
    return made


def gradients(op, given, cotangents):
    """The results of an op, and the gradients of all that it is given."""
    results, pull = jax.vjp(lambda given: op(**given), given)
    return results, pull(tuple(jnp.asarray(d, x.dtype) for d, x in zip(cotangents, results, strict=True)))[0]


def recurrence(lower_bound=None, scale=None, ends=None):
    """FLA's reference: the recurrence of an activated gate, a sequence at a time."""

    def op(q, k, v, g, beta, initial_state, A_log=None, dt_bias=None):
        if lower_bound is not None and A_log is not None:
            g = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)
        elif A_log is not None:
            g = naive_kda_gate(g, A_log, dt_bias)
        if ends is None:
            return naive_recurrent_kda(q, k, v, g, beta, scale, initial_state, output_final_state=True)
        made = [
            naive_recurrent_kda(
                *(x[:, start:end] for x in (q, k, v, g, beta)),
                initial_state=initial_state[n],
                output_final_state=True,
            )
            for n, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        o, states = zip(*made, strict=True)
        return jnp.concatenate(o, axis=1), jnp.concatenate(states)

    return op


# B, T, H, HV, D, dtype, raw gate, ends of the sequences, the other options.
F16, BF16 = np.dtype(np.float16), np.dtype(jnp.bfloat16)
SMALL = [
    (1, 63, 1, 1, 64, F16, False, None, dict(scale=1, safe_gate=True, lower_bound=-5.0)),
    (2, 160, 2, 4, 64, F16, True, None,
     dict(scale=0.1, safe_gate=True, lower_bound=-5.0, disable_recompute=True, chunk_size=32)),
    (2, 160, 2, 4, 64, BF16, True, None,
     dict(scale=0.1, safe_gate=True, lower_bound=-5.0, disable_recompute=True, chunk_size=32)),
    (1, 15, 4, 4, 60, F16, True, [0, 15], dict()),
    (1, 160, 4, 4, 60, F16, True, [0, 31, 96, 160], dict(disable_recompute=True, chunk_size=32)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "D", "dtype", "raw_gate", "ends", "options"),
    SMALL,
)
def test_chunk_kda_against_the_recurrence(B, T, H, HV, D, dtype, raw_gate, ends, options):
    """o and the final state to 0.005, gradients to 0.008, those of g and beta to 0.02."""
    given = arrays(B, T, H, HV, D, dtype, raw_gate, N=len(ends) - 1 if ends else None)
    rng = np.random.default_rng(1)
    cotangents = [rng.standard_normal(given[name].shape) for name in ("v", "initial_state")]
    packing = dict(cu_seqlens=np.array(ends), cu_seqlens_cpu=np.array(ends)) if ends else {}
    options = dict(output_final_state=True, use_gate_in_kernel=raw_gate) | packing | options
    reference = recurrence(options.get("lower_bound"), options.get("scale"), ends)
    expected, expected_d = gradients(reference, given, cotangents)
    made, made_d = gradients(lambda **given: chunk_kda(**given, **options), given, cotangents)
    for x, y in zip(made, expected, strict=True):
        assert error(x, y) <= 0.005
    for name, bound in BOUNDS.items():
        if name in given:
            assert error(made_d[name], expected_d[name]) <= bound, name


def error(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def traced(op, given, **options):
    """o and the final state, h too where asked for; each gradient has the shape and dtype of its array."""

    def call(given):
        results, pull = jax.vjp(lambda given: op(**given, **options), given)
        return results, pull(results)[0]

    results, made = jax.eval_shape(call, given)
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (x.shape, x.dtype) for name, x in given.items()
    }
    (o, final_state, *rest), v, state = results, given["v"], given["initial_state"]
    assert (o.shape, o.dtype) == (v.shape, v.dtype)
    assert (final_state.shape, final_state.dtype) == (state.shape, np.float32)
    return rest


@pytest.mark.parametrize("op", [naive_recurrent_kda, naive_chunk_kda, fused_recurrent_kda])
@pytest.mark.parametrize("sizes", [(4, 1024, 4, 4, 128), (2, 512, 2, 4, 60)])
def test_calls_of_the_recurrences(op, sizes):
    given = arrays(*sizes, np.float32)
    traced(op, given, scale=1, output_final_state=True)
    if op is not fused_recurrent_kda:
        return
    traced(op, given, scale=None, use_qk_l2norm_in_kernel=True, output_final_state=True)
    raw = dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
    traced(op, given, output_final_state=True, state_v_first=True, **raw)  # D by D: either layout
    given = arrays(*sizes, np.float16, raw_gate=True)
    traced(op, given, output_final_state=True, use_gate_in_kernel=True, lower_bound=-5.0)


@pytest.mark.parametrize(
    ("sizes", "dtype", "raw_gate", "options"),
    [
        ((2, 500, 3, 3, 60), F16, False, dict(safe_gate=True, lower_bound=-5.0, disable_recompute=True)),
        pytest.param((3, 1024, 4, 4, 100), F16, False, dict(), marks=slow),
        pytest.param((4, 1024, 4, 4, 128), F16, False, dict(use_qk_l2norm_in_kernel=True), marks=slow),
        pytest.param((2, 1500, 4, 4, 128), F16, True, dict(disable_recompute=True), marks=slow),
        ((2, 1024, 2, 8, 128), BF16, True, dict(use_qk_l2norm_in_kernel=True, chunk_size=64)),
        pytest.param((4, 2048, 8, 8, 64), F16, True, dict(safe_gate=True, lower_bound=-5.0), marks=slow),
        pytest.param((4, 2048, 8, 8, 64), F16, False, dict(state_v_first=True), marks=slow),
        ((1, 8192, 96, 96, 128), BF16, False, dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)),
    ],
)
def test_calls_of_chunk_kda(sizes, dtype, raw_gate, options):
    given = arrays(*sizes, dtype, raw_gate) if sizes[1] < 8192 else shapes(*sizes, dtype)
    traced(chunk_kda, given, scale=0.1, output_final_state=True, use_gate_in_kernel=raw_gate, **options)


def shapes(B, T, H, HV, D, dtype):
    """`arrays` that hold nothing; beta in float32 beside q of 16 bits."""
    sizes = dict(q=(B, T, H, D), k=(B, T, H, D), v=(B, T, HV, D))
    made = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in sizes.items()}
    wide = dict(g=(B, T, HV, D), beta=(B, T, HV), initial_state=(B, HV, D, D))
    return made | {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in wide.items()}


@pytest.mark.parametrize("ends", [LENGTHS[2], *(pytest.param(ends, marks=slow) for ends in LENGTHS[:2])])
def test_calls_of_packed_sequences(ends):
    N, T, packing = len(ends) - 1, ends[-1], dict(cu_seqlens=np.array(ends), cu_seqlens_cpu=np.array(ends))
    given = arrays(1, T, 4, 4, 64, F16, raw_gate=True, N=N)
    traced(chunk_kda, given, output_final_state=True, use_gate_in_kernel=True, **packing)
    given = arrays(1, T, 4, 4, 64, F16, N=N)
    traced(chunk_kda, given, output_final_state=True, safe_gate=True, disable_recompute=True, **packing)


@pytest.mark.parametrize("packing", [dict(), dict(cu_seqlens=np.array([0, 512, 1024]))])
def test_intermediate_states_have_the_dtype_of_k(packing):
    given = arrays(1, 1024, 4, 4, 128, BF16, N=len(packing.get("cu_seqlens", [0, 1])) - 1)
    (h,) = traced(chunk_kda, given, output_final_state=True, return_intermediate_states=True, **packing)
    assert (h.shape, h.dtype) == ((1, 16, 4, 128, 128), BF16)


@pytest.mark.parametrize(("bias", "lower_bound"), [(False, -5.0), (True, None)])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2, 12), (2, 64, 4, 4, 32)])
def test_gates(sizes, bias, lower_bound):
    """The fused gate and the naive one, and their gradients: to 1e-4."""
    made = arrays(*sizes, np.float32, raw_gate=True, bias=bias)
    given = {name: made[name] for name in ("g", "A_log", "dt_bias") if name in made}
    options = {} if lower_bound is None else dict(lower_bound=lower_bound)
    naive = naive_kda_gate if lower_bound is None else naive_kda_lowerbound_gate
    pairs = [
        gradients(lambda op=op, **given: (op(**given, **options),), given, [10 * given["g"]])
        for op in (fused_kda_gate, naive)
    ]
    for x, y in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert error(x, y) <= 1e-4
