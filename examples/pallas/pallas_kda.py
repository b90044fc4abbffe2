"""Chunked KDA as Pallas kernels, forward and backward, in Pallas's interpreter.

A program computes one chunk of one value head. The chunks of a head run one after the other, and the state
between them lies in the block of the final state, which they share. `test_pallas_kda.py` holds every stage to
the kit.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

FIELDS = ("o", "final_state", "g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h")
dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def chunk(q, k, v, g, beta, S, scale):
    """The four stages of one chunk of one head, in float32: q, k, g [C, K], v [C, V], beta [C, 1], and the
    state that enters, S [K, V]."""
    C = len(q)
    i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    t = i[:, :1]

    # Stage 1: the scores by doubling. A token's row is decayed from the start of its block of s tokens, its
    # column to the end of it; `decay` is that of the whole block. The second block of a pair reads the first.
    decay = jnp.exp(g)
    qg, k_in, kg = q * decay, k * decay, k
    A_q, A_k = jnp.where(i == j, jnp.sum(q * k, axis=1, keepdims=True), 0), jnp.zeros((C, C), q.dtype)
    s = 1
    while s < C:
        meet = (i // (2 * s) == j // (2 * s)) & (i // s > j // s)
        A_q = jnp.where(meet, dot(qg, kg.T), A_q)
        A_k = jnp.where(meet, dot(k_in, kg.T), A_k)
        is_second = t // s % 2 == 1
        other = jnp.where(is_second, jnp.roll(decay, s, axis=0), jnp.roll(decay, -s, axis=0))
        qg, k_in = (jnp.where(is_second, x * other, x) for x in (qg, k_in))
        kg = jnp.where(is_second, kg, kg * other)
        decay = decay * other
        s *= 2

    # Stage 2: what the chunk writes into an empty state, and what it takes back.
    Akk = inverse(beta * A_k, i, j)
    w, u = dot(Akk, beta * k_in), dot(Akk, beta * v)
    # Stage 3: the state.
    v_new = u - dot(w, S)
    final_state = decay[:1].T * S + dot(kg.T, v_new)
    # Stage 4: the output.
    o = scale * dot(qg, S) + dot(scale * A_q, v_new)
    made = dict(Aqk=scale * A_q, Akk=Akk, w=w, u=u, qg=qg, kg=kg, v_new=v_new, h=S)
    return made | dict(o=o, final_state=final_state, g=cumsum(g, t) / np.float32(np.log(2)))


def inverse(L, i, j):
    """(I + L)^-1 by substitution: once row n is made, all later rows take L[:, n] times it off."""

    def row(n, X):
        L_n = jnp.sum(jnp.where(j == n, L, 0), axis=1, keepdims=True)
        X_n = jnp.sum(jnp.where(i == n, X, 0), axis=0, keepdims=True)
        return jnp.where(i > n, X - L_n * X_n, X)

    return lax.fori_loop(0, len(L), row, jnp.where(i == j, 1, jnp.zeros_like(L)))


def cumsum(g, t):
    """Over the tokens, in log2(C) steps."""
    s = 1
    while s < len(g):
        g = g + jnp.where(t >= s, jnp.roll(g, s, axis=0), 0)
        s *= 2
    return g


def forward_body(q, k, v, g, beta, S_0, *outputs, scale):
    """A program of the forward: references to a chunk's inputs, and to all that is made of it."""
    outputs = dict(zip(FIELDS, outputs, strict=True))
    S = outputs["final_state"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        S[...] = S_0[...]

    arrays = (x[...].astype(jnp.float32) for x in (q, k, v, g, beta))
    for name, x in chunk(*arrays, S[...], scale).items():
        outputs[name][...] = x.astype(outputs[name].dtype)


def backward_body(q, k, v, g, beta, h, d_o, d_S_out, dq, dk, dv, dg, db, d_S, *, scale):
    """A program of the backward: it makes its chunk again and differentiates it inside the kernel. The
    cotangent of the state goes from the last chunk to the first in d_S."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_S[...] = d_S_out[...]

    def results(*arrays):
        made = chunk(*arrays, scale)
        return made["o"], made["final_state"]

    _, pullback = jax.vjp(results, *(x[...].astype(jnp.float32) for x in (q, k, v, g, beta, h)))
    made = pullback((d_o[...].astype(jnp.float32), d_S[...]))
    for output, x in zip((dq, dk, dv, dg, db, d_S), made, strict=True):
        output[...] = x.astype(output.dtype)


def specs(H, HV, K, V, C, at):
    """The blocks of a program's arrays by kind; program (n, head, c) of the grid is for the chunk `at(c)`."""

    def tokens(heads, *channels):
        block = (None, C, None, *channels)
        return pl.BlockSpec(block, lambda n, h, c: (n, at(c), h // (HV // heads), 0))

    state = pl.BlockSpec((None, None, K, V), lambda n, h, c: (n, h, 0, 0))
    states = pl.BlockSpec((None, None, None, K, V), lambda n, h, c: (n, at(c), h, 0, 0))
    kinds = dict(key=tokens(H, K), K=tokens(HV, K), V=tokens(HV, V), beta=tokens(HV, 1), C=tokens(HV, C))
    return kinds | dict(state=state, states=states)


@partial(jax.jit, static_argnames=("scale", "C"))
def forward(q, k, v, g, beta, S_0, scale, C):
    """{field: array} of N rows of whole chunks: q, k [N, T, H, K], v [N, T, HV, V], g [N, T, HV, K],
    beta [N, T, HV, 1], and the initial states [N, HV, K, V]."""
    (N, T, H, K), (HV, V) = q.shape, v.shape[2:]
    kinds = specs(H, HV, K, V, C, at=lambda c: c)
    channels = dict(g=K, Aqk=C, Akk=C, w=K, u=V, qg=K, kg=K, v_new=V, o=V)
    shapes = {name: jax.ShapeDtypeStruct((N, T, HV, n), q.dtype) for name, n in channels.items()}
    shapes["g"] = jax.ShapeDtypeStruct(g.shape, jnp.float32)
    shapes["h"] = jax.ShapeDtypeStruct((N, T // C, HV, K, V), jnp.float32)
    shapes["final_state"] = jax.ShapeDtypeStruct((N, HV, K, V), jnp.float32)
    kind = dict(g="K", Aqk="C", Akk="C", w="K", u="V", qg="K", kg="K", v_new="V", o="V")
    kind |= dict(h="states", final_state="state")
    made = pl.pallas_call(
        partial(forward_body, scale=scale),
        grid=(N, HV, T // C),
        in_specs=[kinds[x] for x in ("key", "key", "V", "K", "beta", "state")],
        out_specs=[kinds[kind[name]] for name in FIELDS],
        out_shape=[shapes[name] for name in FIELDS],
        interpret=True,
    )(q, k, v, g, beta, S_0)
    return dict(zip(FIELDS, made, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def kda(q, k, v, g, beta, S_0, scale, C):
    """o and the final states of `forward`, with a gradient."""
    made = forward(q, k, v, g, beta, S_0, scale, C)
    return made["o"], made["final_state"]


def kda_fwd(*arguments):
    made = forward(*arguments)
    return (made["o"], made["final_state"]), (*arguments[:5], made["h"])


def kda_bwd(scale, C, saved, cotangents):
    q, _, v, g, beta, _ = saved
    (N, T, H, K), (HV, V) = q.shape, v.shape[2:]
    kinds = specs(H, HV, K, V, C, at=lambda c: T // C - 1 - c)
    dq = jax.ShapeDtypeStruct((N, T, HV, K), jnp.float32)  # a q/k head for every value head
    d_S = jax.ShapeDtypeStruct((N, HV, K, V), jnp.float32)
    dq, dk, *made = pl.pallas_call(
        partial(backward_body, scale=scale),
        grid=(N, HV, T // C),
        in_specs=[kinds[x] for x in ("key", "key", "V", "K", "beta", "states", "V", "state")],
        out_specs=[kinds[x] for x in ("K", "K", "V", "K", "beta", "state")],
        out_shape=[dq, dq, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (v, g, beta)), d_S],
        interpret=True,
    )(*saved, *cotangents)
    dq, dk = (x.reshape(N, T, H, HV // H, K).sum(3).astype(q.dtype) for x in (dq, dk))
    return dq, dk, *made


kda.defvjp(kda_fwd, kda_bwd)


class Rows:
    """Each sequence in a row of its own, padded to whole chunks by zeros, which change no state."""

    def __init__(self, cu_seqlens, B, T, C):
        if cu_seqlens is None:
            starts, lengths, batch = np.zeros(B, int), np.full(B, T), np.arange(B)
        else:
            starts, lengths = np.asarray(cu_seqlens)[:-1], np.diff(cu_seqlens)
            batch = np.zeros(len(starts), int)
        self.shape, self.chunks = (B, T), -(-lengths // C)
        token = np.arange(C * max(1, *self.chunks))
        self.inside = token < lengths[:, None]  # [N, NT * C]
        self.batch, self.token = batch[:, None], np.where(self.inside, starts[:, None] + token, 0)

    def split(self, x):
        inside = self.inside.reshape(*self.inside.shape, *[1] * (x.ndim - 2))
        return jnp.where(inside, x[self.batch, self.token], 0)

    def merge(self, x):
        n, i = np.nonzero(self.inside)
        at = self.batch[n, 0], self.token[n, i]
        return jnp.zeros((*self.shape, *x.shape[2:]), x.dtype).at[at].set(x[n, i])

    def merge_states(self, h):
        """Without the chunks that a sequence does not have, [B, NT, HV, K, V]."""
        n, c = np.nonzero(np.arange(h.shape[1]) < self.chunks[:, None])
        return h[n, c].reshape(self.shape[0], -1, *h.shape[2:])


def chunk_kda_fwd(
    q, k, v, g, beta, scale, initial_state=None, output_final_state=False, cu_seqlens=None, chunk_size=64,
    disable_recompute=True, run=forward, **options,
):  # fmt: skip
    """FLA's contract, as the kit calls it: {field: array}."""
    if options:
        raise NotImplementedError(f"{', '.join(options)}: gates come as log decays, states as [K, V]")
    rows = Rows(cu_seqlens, *q.shape[:2], chunk_size)
    if initial_state is None:
        initial_state = jnp.zeros((len(rows.chunks), v.shape[2], q.shape[3], v.shape[3]), jnp.float32)
    tokens = (rows.split(x) for x in (q, k, v, g, beta[..., None]))
    made = run(*tokens, initial_state, scale, chunk_size)
    whole = {name: rows.merge(x) for name, x in made.items() if name not in ("h", "final_state")}
    whole["final_state"] = made["final_state"] if output_final_state else None
    return whole | dict(h=rows.merge_states(made["h"])) if "h" in made else whole


def chunk_kda(*arrays, **options):
    """o and the final state, with a gradient by `kda`."""
    made = chunk_kda_fwd(*arrays, **options, run=lambda *x: dict(zip(FIELDS, kda(*x), strict=False)))
    return made["o"], made["final_state"]
