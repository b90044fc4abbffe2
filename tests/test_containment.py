"""NaN and inf stay where they are: in their sequence, in their chunk and after, in the padding.

Bit for bit: a chunk's arithmetic reads its own tokens and its own state, and nothing else.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import draw

from tops.cpu.kda import (
    chunk_gated_delta_rule_fwd_h,
    chunk_gla_fwd_o_gk,
    chunk_kda,
    chunk_kda_fwd,
    chunk_kda_fwd_intra,
    chunk_local_cumsum,
    fused_recurrent_kda,
    kda_gate_chunk_cumsum,
    naive_chunk_kda,
    naive_recurrent_kda,
    prepare_chunk_indices,
    recompute_w_u_fwd,
)
from tops.cpu.kda.one_chunk.triangle import BlockLower, invert_blocks

pytestmark = pytest.mark.unoptimized
T, H, HV, K, V, C = 163, 1, 2, 6, 5, 32
ENDS = np.array([0, 40, 40, 41, 111, 131])  # an empty sequence, one token, three chunks; 32 tokens of padding
N = len(ENDS) - 1
INDICES = prepare_chunk_indices(ENDS, C)
RAW = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
POISON = [np.nan, np.inf, -np.inf]


def whole(op, names=("o", "final_state"), **options):
    def call(initial_state, **x):
        options_ = options | dict(initial_state=initial_state, output_final_state=True, cu_seqlens=ENDS)
        return dict(zip(names, op(**x, **options_), strict=False))

    return call


def every_field(initial_state, **x):
    fields = chunk_kda_fwd(
        **x,
        initial_state=initial_state,
        output_final_state=True,
        disable_recompute=True,
        cu_seqlens=ENDS,
        chunk_size=C,
    )
    return {name: y for name, y in fields._asdict().items() if name != "initial_state"}


def intra(q, k, v, gk, beta):
    options = dict(cu_seqlens=ENDS, chunk_size=C, disable_recompute=True)
    made = chunk_kda_fwd_intra(q, k, v, gk, beta, **options)
    return dict(zip(("w", "u", "qg", "kg", "Aqk", "Akk"), made, strict=True))


def wy(q, k, v, gk, beta, A):
    made = recompute_w_u_fwd(k, v, beta, A, gk=gk, q=q, cu_seqlens=ENDS)
    return dict(zip(("w", "u", "qg", "kg"), made, strict=True))


def state_pass(kg, w, u, gk, g, initial_state):
    options = dict(initial_state=initial_state, output_final_state=True, chunk_size=C, cu_seqlens=ENDS)
    made = chunk_gated_delta_rule_fwd_h(kg, w, u, g, gk, **options)
    return dict(zip(("h", "v_new", "final_state"), made, strict=True))


def output(q, v_new, gk, A, h):
    return dict(o=chunk_gla_fwd_o_gk(q, v_new, gk, A, h, None, cu_seqlens=ENDS, chunk_size=C))


def sums(g):
    gate = dict(A_log=np.zeros(HV, np.float32), dt_bias=np.ones(HV * K, np.float32))
    options = dict(chunk_size=C, cu_seqlens=ENDS)
    backwards = chunk_local_cumsum(g, reverse=True, **options)
    return dict(g=kda_gate_chunk_cumsum(g, **gate, **options), backwards=backwards)


CALLS = {
    "chunk_kda": whole(chunk_kda, chunk_size=C),
    "chunk_kda, raw": whole(chunk_kda, chunk_size=C, A_log=np.zeros(HV, np.float32), **RAW),
    "chunk_kda, storage": whole(chunk_kda, chunk_size=C, storage_dtype="bfloat16"),
    "chunk_kda_fwd": every_field,
    "fused_recurrent_kda": whole(fused_recurrent_kda, A_log=np.zeros(HV, np.float32), **RAW),
    "naive_recurrent_kda": whole(naive_recurrent_kda),
    "naive_chunk_kda": whole(naive_chunk_kda, chunk_size=C),
    "chunk_kda_fwd_intra": intra,
    "recompute_w_u_fwd": wy,
    "chunk_gated_delta_rule_fwd_h": state_pass,
    "chunk_gla_fwd_o_gk": output,
    "chunk_local_cumsum": sums,
}
WHOLE = ("q", "k", "v", "g", "beta", "initial_state")
INPUTS = {
    "chunk_kda": WHOLE,
    "chunk_kda, raw": WHOLE,
    "chunk_kda, storage": WHOLE,
    "chunk_kda_fwd": WHOLE,
    "fused_recurrent_kda": WHOLE,
    "naive_recurrent_kda": WHOLE,
    "naive_chunk_kda": WHOLE,
    "chunk_kda_fwd_intra": ("q", "k", "v", "gk", "beta"),
    "recompute_w_u_fwd": ("q", "k", "v", "gk", "beta", "A"),
    "chunk_gated_delta_rule_fwd_h": ("kg", "w", "u", "gk", "g", "initial_state"),
    "chunk_gla_fwd_o_gk": ("q", "v_new", "gk", "A", "h"),
    "chunk_local_cumsum": ("g",),
}


@cache
def clean(name):
    """(the jitted call, its inputs, what it gives)."""
    rng = np.random.default_rng(0)
    arrays = dict(zip(("q", "k", "v", "g", "beta"), draw(T=T, H=H, HV=HV, K=K, V=V), strict=True))
    arrays["initial_state"] = rng.standard_normal((N, HV, K, V)).astype(np.float32)
    if name not in ("chunk_kda", "chunk_kda_fwd"):
        fields = clean("chunk_kda_fwd")[2]
        if name == "chunk_gated_delta_rule_fwd_h":
            arrays["g"] = arrays["beta"]
        arrays |= {field: fields[field] for field in ("w", "u", "kg", "v_new", "h")}
        arrays |= dict(gk=fields["g"], A=fields["Akk"])
    arrays = {argument: arrays[argument] for argument in INPUTS[name]}
    call = jax.jit(CALLS[name])
    return call, arrays, {field: np.asarray(x) for field, x in call(**arrays).items()}


def rows(field, n):
    """Where sequence n lies: an index of the array's first two axes."""
    if field in ("initial_state", "final_state"):
        return np.s_[n]
    if field == "h":
        return np.s_[:, INDICES[:, 0] == n]
    return np.s_[:, ENDS[n] : ENDS[n + 1]]


def without(field, x, n):
    """x with sequence n zeroed."""
    x = np.array(x)
    x[rows(field, n)] = 0
    return x


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        pytest.param(name, x, marks=[pytest.mark.slow] if name == "naive_chunk_kda" and x != "k" else [])
        for name in INPUTS
        for x in INPUTS[name]
    ],
)
def test_in_its_sequence(name, argument):
    call, arrays, expected = clean(name)
    for n in range(N):
        for poison in POISON:
            poisoned = np.array(arrays[argument])
            poisoned[rows(argument, n)] = poison
            found = call(**arrays | {argument: poisoned})
            for field, x in found.items():
                np.testing.assert_array_equal(
                    without(field, x, n), without(field, expected[field], n), f"{field} after {poison} in {n}"
                )
        seen = any(not np.array_equal(found[field], x) for field, x in expected.items())
        assert seen or ENDS[n] == ENDS[n + 1]  # the poison was there


@pytest.mark.parametrize("name", INPUTS)
def test_in_the_padding(name):
    """All arguments at once; the output there is zero."""
    call, arrays, expected = clean(name)
    for poison in POISON:
        poisoned = {argument: np.array(x) for argument, x in arrays.items()}
        for argument, x in poisoned.items():
            if argument not in ("initial_state", "h"):
                x[:, ENDS[-1] :] = poison
        for field, x in call(**poisoned).items():
            np.testing.assert_array_equal(x, expected[field], field)
            if field not in ("final_state", "h"):
                assert not np.asarray(x)[:, ENDS[-1] :].any(), field


@pytest.mark.parametrize("argument", ["q", "k", "v", "g", "beta"])
@pytest.mark.parametrize("name", ["chunk_kda", "chunk_kda, raw", "chunk_kda_fwd", "fused_recurrent_kda"])
def test_in_its_chunk_and_after(name, argument):
    """A token's poison leaves all earlier chunks of its sequence as they were; for the recurrence, all
    earlier tokens."""
    call, arrays, expected = clean(name)
    n = 3
    chunk = 1 if name == "fused_recurrent_kda" else C
    for t in (0, 1, C - 1, C, C + 7, 2 * C, ENDS[n + 1] - ENDS[n] - 1):
        first = ENDS[n] + t - t % chunk
        for poison in POISON:
            poisoned = np.array(arrays[argument])
            poisoned[:, ENDS[n] + t] = poison
            for field, x in call(**arrays | {argument: poisoned}).items():
                if field == "h":  # what enters a chunk is older than its tokens
                    index = np.s_[:, : np.searchsorted(INDICES[:, 0], n) + t // C + 1]
                elif field == "final_state":
                    index = np.s_[:n]
                else:
                    index = np.s_[:, :first]
                np.testing.assert_array_equal(np.asarray(x)[index], expected[field][index], field)


@cache
def gradients():
    """The jitted pullback of chunk_kda, its inputs and cotangents, and the gradients."""
    _, arrays, made = clean("chunk_kda")
    rng = np.random.default_rng(1)
    cotangents = {field: rng.standard_normal(x.shape).astype(x.dtype) for field, x in made.items()}

    @jax.jit
    def pullback(arrays, cotangents):
        return jax.vjp(lambda arrays: CALLS["chunk_kda"](**arrays), arrays)[1](cotangents)[0]

    expected = pullback(arrays, cotangents)
    return pullback, arrays, cotangents, {field: np.asarray(x) for field, x in expected.items()}


@pytest.mark.parametrize("argument", ["q", "k", "v", "g", "beta", "initial_state", "do", "dfinal_state"])
def test_gradients_in_their_sequence(argument):
    pullback, arrays, cotangents, expected = gradients()
    for n in range(N):
        for poison in POISON:
            poisoned = arrays | {f"d{field}": x for field, x in cotangents.items()}
            poisoned[argument] = np.array(poisoned[argument])
            poisoned[argument][rows(argument.removeprefix("d"), n)] = poison
            found = pullback(
                {field: poisoned[field] for field in arrays},
                {field: poisoned[f"d{field}"] for field in cotangents},
            )
            for field, x in found.items():
                np.testing.assert_array_equal(
                    without(field, x, n), without(field, expected[field], n), f"{field} after {poison} in {n}"
                )


def test_gradients_in_the_padding():
    pullback, arrays, cotangents, expected = gradients()
    for poison in POISON:
        arrays = {argument: np.array(x) for argument, x in arrays.items()}
        cotangents = {field: np.array(x) for field, x in cotangents.items()}
        for argument, x in [*arrays.items(), *cotangents.items()]:
            if argument not in ("initial_state", "final_state"):
                x[:, ENDS[-1] :] = poison
        for field, x in pullback(arrays, cotangents).items():
            np.testing.assert_array_equal(x, expected[field], field)
            if field != "initial_state":
                assert not np.asarray(x)[:, ENDS[-1] :].any(), field


def test_the_inverse_of_a_block_reads_below_its_diagonal_alone():
    """Above it lie zeros times beta, NaN where beta is: the bits of the inverse do not change."""
    L = np.tril(np.random.default_rng(0).standard_normal((2, 3, 16, 16)), -1)
    dirty = np.where(np.tri(16, k=-1, dtype=bool), L, np.nan)
    inverses = [invert_blocks(BlockLower(jnp.asarray(x), ())) for x in (dirty, L)]
    np.testing.assert_array_equal(*inverses)
