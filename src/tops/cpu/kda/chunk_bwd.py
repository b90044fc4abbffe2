"""The gradient of a dense forward over whole chunks, in the memory that its results take anyway.

Of every chunk the backward pass needs the state that entered it, the inverses of `Intra`, v_new, and

    e = v - k_in S - A v_new      A[i,j] = k_i . k_j D(i<-j), j < i

of which `v_new = beta e`. With these at hand nothing is read of the state or solved again. But for the small
inverses they are kept where the gradients of the chunk's tokens will lie, until which nobody needs the memory
(inside one `jit`): the state that leaves the chunk in the rows of q and k, v_new in those of g. They are part
of what the gradients that take their place are made of, so they are read before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .chunk_delta_h import next_state
from .chunk_intra import intra, whole
from .chunk_o import of_state
from .chunking import cut, merge_heads, put, split_heads
from .dot import dot, inner, once
from .solve import solve

KEPT = ("written", "inverse")


def fits(q, k, v, g, C, dtype):
    """Whether that memory is enough: whole chunks, no grouped heads, all in the arithmetic's dtype."""
    (T, H, K), (HV, V) = q.shape[1:], v.shape[2:]
    return T % C == 0 and H == HV and V <= K <= 2 * C and {x.dtype for x in (q, k, g)} == {dtype}


def keep(prepare, one_chunk, C, S, inputs, parameters):
    """What the scan over the chunks returns, and what `pull` needs of them: the places and the inverses.

    `prepare(rows, parameters)` activates a chunk's rows; `one_chunk(S, *rows, fields=)` makes the next state
    and fields.
    """
    K = S.shape[-2]

    def step(carry, start):
        S, o, places = carry
        rows = prepare([cut(x, start, None, C) for x in inputs], parameters)
        S, made = one_chunk(S, *(split_heads(x, S.shape[1]) for x in rows), fields=("o", *KEPT))
        kept = [*(S[:, :, i : i + C] for i in range(0, K, C)), made["written"]]
        places = [_lay(x, merge_heads(rows), start) for x, rows in zip(places, kept, strict=True)]
        return (S, put(o, merge_heads(made["o"]), start, None), places), made["inverse"]

    carry = S, jnp.zeros_like(inputs[2]), [_new(inputs, i) for i in _holders(K, C)]
    (S, o, places), inverses = lax.scan(step, carry, jnp.arange(0, inputs[0].shape[1], C))
    return (S, dict(o=o), None), (places, inverses)


def pull(prepare, scale, C, args, kept, cotangents, wanted):
    """The cotangents of `keep`'s S, inputs and parameters; of inputs that are not `wanted`, anything."""
    S_0, inputs, parameters = args
    places, inverses = kept
    d_S, d_o, _ = cotangents
    wanted = [i for i, is_wanted in enumerate(wanted[1]) if is_wanted]
    H, K, V = S_0.shape[1:]

    def read(d_inputs, start):
        """S and what was written to it, at once: before the gradients are laid there."""
        *of_state, of_written = (d_inputs[i] for i in _holders(K, C))
        before = jnp.maximum(start - C, 0)
        parts = [_find(x, before, min(C, K - i * C), V) for i, x in enumerate(of_state)]
        S = jnp.concatenate([split_heads(x, H) for x in parts], axis=-2)
        return once((jnp.where(start > 0, S, S_0), split_heads(_find(of_written, start, C, V), H)))

    def step(carry, chunk):
        start, inverse = chunk
        d_S, d_inputs, d_parameters = carry
        d_inputs = list(d_inputs)
        S, written = read(d_inputs, start)
        rows, pull_prepare = jax.vjp(prepare, [cut(x, start, None, C) for x in inputs], parameters)
        q, k, _, g, beta = (split_heads(x, H) for x in rows)
        d_rows = split_heads(cut(d_o["o"], start, None, C), H)
        d_S, *d_rows = pull_chunk(S, written, inverse, q, k, g, beta, scale, d_S, d_rows)
        d_rows, d_own = pull_prepare(tuple(merge_heads(x) for x in d_rows))
        # XLA is fast if they are made first.
        d_rows = lax.optimization_barrier({i: d_rows[i] for i in wanted})
        for i, rows in d_rows.items():
            d_inputs[i] = _lay(d_inputs[i], rows, start)
        return (d_S, d_inputs, jax.tree.map(jnp.add, d_parameters, d_own)), None

    d_inputs = [_new(inputs, i) for i in range(len(inputs))]
    for i, place in zip(_holders(K, C), places, strict=True):
        d_inputs[i] = place
    carry = d_S, d_inputs, jax.tree.map(jnp.zeros_like, parameters)
    chunks = jnp.arange(0, inputs[0].shape[1], C), inverses
    (d_S, d_inputs, d_parameters), _ = lax.scan(step, carry, chunks, reverse=True)
    return d_S, tuple(d_inputs), d_parameters


def _holders(K, C):
    """Those of q, k, v, g, beta whose gradients hold the K rows of a state, C each; the last holds v_new."""
    return (0, 3) if K <= C else (0, 1, 3)


def _new(inputs, i):
    """An array like an input, of which nothing is read before it is written. Each has another number in it:
    of two equal ones XLA makes one and copies it."""
    return jnp.full(inputs[i].shape, i + 1, inputs[i].dtype)


def _lay(x, rows, start):
    """x [B, T, ...] with rows written to it from `start` on: a chunk's, or fewer, or narrower ones."""
    return lax.dynamic_update_slice(x, rows.astype(x.dtype), (0, start, *[0] * (x.ndim - 2)))


def _find(x, start, rows, width):
    """So many rows from `start` on, and so much of each."""
    return lax.dynamic_slice(x, (0, start, 0, 0), (x.shape[0], rows, x.shape[2], width))


def written(v_new, e, beta):
    """v_new, of which e is a quotient; but e where beta is too small to divide by. Made of e, v_new would not
    keep its bits, and where keys repeat, its errors would no longer correct one another."""
    return jnp.where(_small(beta)[..., None], e, v_new)


def _small(beta):
    return jnp.abs(beta) < jnp.finfo(beta.dtype).eps


def pull_chunk(S, written, inverse, q, k, g, beta, scale, d_S, d_o):
    """The cotangents of S, q, k, v, g and beta of one chunk, from those of the state that leaves it and of o.

        d_v_new  = kg d_S + scale Aqk^T d_o
        d_r      = (I + L)^-T d_v_new              r = beta (v - k_in S)
        d_v      = beta d_r           d_beta = d_r . e
        d_reads  = scale d_o of q, -d_v of k
        d_S      = D(C<-0) d_S + x_in^T d_reads

    S [..., K, V]; what was `written`, d_o [..., C, V]; the inverse of an `Intra`; q, k, g [..., C, K];
    beta [..., C]. The rest is the gradient of stage 1: of its rows, its scores and its decays.
    """

    def stage_1(q, k, g):
        chunk = intra(q, k, jnp.exp(g), beta, parts=1)
        return (chunk.x_in, chunk.inside, chunk.below, chunk.kg, chunk.decay), chunk

    _, pull_stage_1, chunk = jax.vjp(stage_1, q, k, g, has_aux=True)
    chunk = chunk._replace(inverse=inverse)
    # Behind the barriers each is made once, not anew for every product that it is an operand of.
    small = _small(beta)
    v_new = lax.optimization_barrier(jnp.where(small[..., None], beta[..., None] * written, written))
    _, pull_next_state = jax.vjp(next_state, S, chunk.kg, v_new, chunk.decay)
    d_S, d_kg, d_v_new, d_decay = pull_next_state(d_S)
    d_o = scale * d_o
    _, pull_solve = jax.vjp(partial(solve, chunk, beta), v_new)  # linear in r
    (d_r,) = pull_solve((d_v_new, d_o))
    d_v = beta[..., None] * d_r
    d_reads = jnp.stack([d_o, -d_v], axis=-2)
    d_reads = lax.optimization_barrier(d_reads.reshape(*d_o.shape[:-2], -1, d_o.shape[-1]))

    def reads(S, x_in, inside, below):
        """`chunk_o.reads`, of all scores at once, for its gradient alone: one product for all of them. Itself
        it would hold 0 times what later tokens write."""
        return of_state(S, x_in) + dot("...ij,...jv->...iv", whole(inside, below), v_new)

    _, pull_reads = jax.vjp(reads, S, chunk.x_in, chunk.inside, chunk.below)
    d_S_read, *d_scores = pull_reads(d_reads)
    d_q, d_k, d_g = pull_stage_1((*d_scores, d_kg, d_decay))
    d_beta = inner(d_r, written) / jnp.where(small, 1, beta)
    return d_S + d_S_read, d_q, d_k, d_v, d_g, d_beta
