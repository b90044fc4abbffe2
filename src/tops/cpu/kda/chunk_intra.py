"""Stage 1: the two triangles inside a chunk, Aqk and Akk."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, chunking
from .decay import double, halves, of_tokens
from .dot import PARTS, dot, inner, merge_channels, pick, split_channels, spread, storage, sum_parts
from .solve import invert, solve
from .wy_fast import recompute_w_u

BLOCK = 16  # tokens of the blocks in which (I + L) is inverted; of a chunk size at least


class Intra(NamedTuple):
    """What stage 1 hands on: the scores, as the doubling leaves them, and what it ends with.

    Rows of q and of k take turns: row 2i of `inside`, `below` and `x_in` is q_i's, row 2i + 1 is k_i's.
    Without q, row i is k_i's.
    """

    inside: jax.Array  # [..., C/b, 2b, b]  x_i . k_j D(i<-j) inside blocks of b = BLOCK tokens
    below: tuple  # [..., C/2s, 2s, s] for s = b, 2b, ..., C/2: the second half of 2s tokens by the first
    L: jax.Array  # [..., C/b, b, b]  beta_i k_i . k_j D(i<-j) inside blocks
    inverse: jax.Array  # [..., C/b, b, b]  (I + L)^-1 of each
    x_in: jax.Array  # [..., P, 2C, K/P]  x_i * D(i<-0), channels in parts
    kg: jax.Array  # [..., P, C, K/P]  k_j * D(C<-j)
    decay: jax.Array  # [..., K]  D(C<-0)


def intra(q, k, a, beta, parts=PARTS):
    """The causal scores of one chunk, of q (diagonal included) and of k (below it) with k, and (I + L)^-1 of
    the blocks that `solve` ends at.

        x_i . k_j D(i<-j) = sum_d x_i k_j D(i<-j)      x = q, k

    q, k, a = exp(g) [..., C, K], beta [..., C]; C a power of two, 16 or more. q is None where nothing is
    read, only the state passed on. Sums over channels are taken in so many `parts`. Returns an `Intra`.

    The triangle grows by doubling: the scores between the two halves of a block of 2s tokens are one
    matrix product (see `decay`).
    """
    *lead, C, K = a.shape
    x = jnp.stack([k] if q is None else [q, k], axis=-2)
    diagonal = [jnp.zeros_like(k[..., 0])]  # k's
    if q is not None:
        diagonal = [inner(q, k), *diagonal]
    rows = x * spread(a[..., None, :], -2, x.shape[-2])
    rows = split_channels(rows.reshape(*lead, -1, K), parts)
    rows = lax.optimization_barrier(rows)  # made once, not anew at every level
    cols, total = split_channels(k, parts), split_channels(a, parts)
    inside = jnp.stack(diagonal, axis=-1)[..., None]
    below = ()
    s = 1
    while s < C:
        n = C // (2 * s)
        x_2, k_1 = halves(rows, n)[1], halves(cols, n)[0]
        scores = sum_parts((_with_one if s == 1 else _with_all)(x_2, k_1), -4)
        if s < BLOCK:
            inside = _set_below(inside, scores)
        else:
            below += (scores,)
        rows, cols, total = double(rows, cols, total)
        s *= 2
    of_k = pick(inside.reshape(*lead, C // BLOCK, BLOCK, -1, BLOCK), -2, x.shape[-2] - 1)
    L = spread(beta.reshape(*lead, C // BLOCK, BLOCK, 1), -1, BLOCK) * of_k
    return Intra(inside, below, L, invert(L), rows, cols, merge_channels(total)[..., 0, :])


def _with_all(x, k):
    return dot("...ik,...jk->...ij", x, k)


@jax.custom_jvp
def _with_one(x, k):
    """The scores of x [..., R, K] with a single k [..., 1, K], [..., R, 1]."""
    return inner(x, k)[..., None] if x.shape[-2] == 1 else _with_all(x, k)


@_with_one.defjvp
def _with_one_jvp(primals, tangents):
    """Row by row: a gradient multiplies element by element then, where that of the product has a product for
    every token."""
    (x, k), (dx, dk) = primals, tangents
    of_k = [_with_all(row, dk) for row in jnp.split(x, x.shape[-2], axis=-2)]
    return _with_one(x, k), _with_all(dx, k) + jnp.concatenate(of_k, axis=-2)


def triangles(chunk, beta, scale):
    """The two triangles as matrices.

        Aqk[i,j] = scale * sum_d q_i k_j D(i<-j)     j <= i
        Akk      = (I + L)^-1,  L[i,j] = beta_i * sum_d k_i k_j D(i<-j), j < i

    beta [..., C]. Returns Aqk and Akk, [..., C, C].
    """
    Aqk = scale * whole(chunk.inside, chunk.below)[..., 0::2, :]
    identity = jnp.broadcast_to(jnp.eye(Aqk.shape[-1], dtype=Aqk.dtype), Aqk.shape)
    inside, *below = (x[..., 1::2, :] for x in (chunk.inside, *chunk.below))  # without q's rows
    Akk, _ = solve(chunk._replace(inside=inside, below=tuple(below)), beta, identity)
    return Aqk, Akk


def whole(inside, below):
    """The scores of an `Intra` as one matrix, [..., R * C, C] of R rows a token, zero above the diagonal."""
    for scores in below:
        inside = _set_below(inside, scores)
    return inside[..., 0, :, :]


def _set_below(diagonal, below):
    """Diagonal blocks [..., 2n, R, s] in pairs, and the block below each pair, as [..., n, 2R, 2s]."""
    upper = jnp.concatenate([diagonal[..., 0::2, :, :], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[..., 1::2, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def chunk_kda_fwd_intra(
    q,
    k,
    v,
    gk,
    beta,
    scale=None,
    cu_seqlens=None,
    chunk_size=64,
    chunk_indices=None,
    safe_gate=False,
    lower_bound=None,
    disable_recompute=False,
    *,
    use_exp2=True,
    storage_dtype=None,
):
    """Stages 1 and 2 on their own, in token layout, as FLA's function of this name does both.

        Aqk[i,j] = scale * sum_d q_i k_j D(i<-j)     j <= i
        Akk      = (I + L)^-1,  L[i,j] = beta_i * sum_d k_i k_j D(i<-j), j < i
        w = Akk (beta * k * D(i<-0))      u = Akk (beta * v)
        qg = q * D(i<-0)                  kg = k * D(C<-j)

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        gk: [B, T, HV, K], chunk-local cumulative sum of the log decays, finite; in `use_exp2`'s unit.
        beta: [B, T, HV].
        scale: a number; None is K ** -0.5.
        chunk_size: C, one of 16, 32, 64, 128.
        cu_seqlens, chunk_indices: as for `chunk_kda_fwd`.
        safe_gate, lower_bound: accepted for FLA's sake; the products of decays are safe for all gates.
        disable_recompute: return qg too.
        use_exp2: the unit of gk, log2 (as `chunk_kda_fwd` returns g) or nats.
        storage_dtype: round what is returned, and the operands of the products, to it; None keeps them.

    Returns:
        w [B, T, HV, K], u [B, T, HV, V], qg [B, T, HV, K] or None, kg [B, T, HV, K], Aqk and Akk
        [B, T, HV, C]; in `storage_dtype`, or else in the widest dtype of the arguments, float32 or wider.
        Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk_intra.chunk_kda_fwd_intra`.
    """
    checks.flags(disable_recompute=disable_recompute, use_exp2=use_exp2)
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("gk", gk, "B T HV K", sizes)
    checks.tensor("beta", beta, "B T HV", sizes)
    checks.sequences(cu_seqlens, sizes)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    checks.safe_gate(safe_gate, lower_bound)
    scale = checks.number_or("scale", scale, sizes["K"] ** -0.5)
    storage_dtype = checks.storage(storage_dtype)
    NT = chunking.exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, chunk_size)
    w, u, qg, kg, Aqk, Akk = _chunk_kda_fwd_intra(
        *(q, k, v, gk, beta, cu_seqlens),
        **dict(NT=NT, C=chunk_size, scale=scale, use_exp2=use_exp2, storage_dtype=storage_dtype),
    )
    return w, u, qg if disable_recompute else None, kg, Aqk, Akk


@partial(jax.jit, static_argnames=("NT", "C", "scale", "use_exp2", "storage_dtype"))
def _chunk_kda_fwd_intra(q, k, v, gk, beta, cu_seqlens, *, NT, C, scale, use_exp2, storage_dtype):
    T, HV = v.shape[1:3]
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, jnp.result_type(jnp.float32, q, k, v, gk, beta))
    a = of_tokens(chunks.split_cumsum(gk), use_exp2)
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta))
    chunk = intra(q, k, a, beta)
    Aqk, Akk = (store(x) for x in triangles(chunk, beta, scale))
    x_in = merge_channels(chunk.x_in)
    w, u = recompute_w_u(Akk, x_in[..., 1::2, :], v, beta, store)
    made = w, u, store(x_in[..., 0::2, :]), store(merge_channels(chunk.kg)), Aqk, Akk
    return tuple(chunks.merge(x, storage_dtype) for x in made)
