"""Stage 1: the two triangles inside a chunk, Aqk and Akk."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import checks, chunking
from .decay import double, halves, of_tokens
from .dot import dot, storage
from .wy_fast import recompute_w_u


class Intra(NamedTuple):
    """What stage 1 hands on; the decayed q and k are what the doubling ends with."""

    Aqk: jax.Array  # [..., C, C]  scale * sum_d q_i k_j D(i<-j), j <= i
    Akk: jax.Array  # [..., C, C]  (I + L)^-1
    qg: jax.Array  # [..., C, K]   q_i * D(i<-0)
    k_in: jax.Array  # [..., C, K] k_i * D(i<-0)
    kg: jax.Array  # [..., C, K]   k_j * D(C<-j)
    decay: jax.Array  # [..., K]   D(C<-0)


def intra(q, k, a, beta, scale, store):
    """The causal scores of one chunk and the inverse of its delta-rule system.

        Aqk[i,j] = scale * sum_d q_i k_j D(i<-j)      j <= i
        L[i,j]   = beta_i * sum_d k_i k_j D(i<-j)     j <  i
        Akk      = (I + L)^-1

    q, k [..., C, K], with leading dimensions that broadcast against a's; a = exp(g) [..., C, K];
    beta [..., C]; C a power of two; `store` rounds what FLA stores. Returns an `Intra`.

    All three triangles grow by doubling. The blocks on the diagonal stand; the scores below them are
    one matrix product (see `decay`); the inverse below them follows from
    [[M1, 0], [L21, M2]]^-1 = [[M1^-1, 0], [-M2^-1 L21 M1^-1, M2^-1]].
    """
    C = a.shape[-2]
    rows = jnp.stack([q * a, k * a], axis=-3)  # [..., 2, C, K]
    cols = jnp.broadcast_to(k, a.shape)
    total = a
    Aqk = jnp.broadcast_to(scale * jnp.sum(q * k, axis=-1), beta.shape)[..., None, None]
    Akk = jnp.ones_like(Aqk)  # [..., C/s, s, s], the blocks on the diagonal
    L = jnp.zeros_like(Aqk)
    s = 1
    while s < C:
        scores = _scores(halves(rows, s)[1], halves(cols, s)[0])
        L21 = halves(beta[..., None], s)[1] * scores[..., 1, :, :, :]
        Akk21 = -_product(Akk[..., 1::2, :, :], _product(L21, Akk[..., 0::2, :, :]))
        Aqk = _set_below(Aqk, scale * scores[..., 0, :, :, :])
        Akk = _set_below(Akk, Akk21)
        L = _set_below(L, L21)
        rows, cols, total = double(rows, cols, total, s)
        s *= 2
    Aqk, Akk, L = (x[..., 0, :, :] for x in (Aqk, Akk, L))
    Akk = _refine_inverse(Akk, L)
    qg, k_in = rows[..., 0, :, :], rows[..., 1, :, :]
    return Intra(store(Aqk), store(Akk), store(qg), k_in, store(cols), total[..., 0, :])


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
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("gk", gk, "B T HV K", sizes)
    checks.tensor("beta", beta, "B T HV", sizes)
    checks.sequences(cu_seqlens, sizes)
    checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
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
    T, H = q.shape[1:3]
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, H, jnp.result_type(jnp.float32, q, k, v, gk, beta))
    a = of_tokens(chunks.split_cumsum(gk), use_exp2)
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta))
    chunk = intra(q, k, a, beta, scale, store)
    w, u = recompute_w_u(chunk.Akk, chunk.k_in, v, beta, store)
    made = w, u, chunk.qg, chunk.kg, chunk.Aqk, chunk.Akk
    return tuple(chunks.merge(x, storage_dtype) for x in made)


def _scores(rows, cols):
    """rows_i . cols_j for two sets of rows, [..., 2, n, s, K] and [..., n, s, K] to [..., 2, n, s, s].

    Summed pairwise over parts of K. One long sum errs the same way for every pair of equal keys, and with
    beta near 2 a chunk amplifies a shift that all of L shares: shorter sums shift it less.
    """
    parts = math.gcd(rows.shape[-1], 8)
    rows, cols = (x.reshape(*x.shape[:-1], parts, -1) for x in (rows, cols))
    scores = dot("...rnipk,...njpk->...prnij", rows, cols)
    while parts > 1:
        parts //= 2
        scores = scores[..., :parts, :, :, :, :] + scores[..., parts:, :, :, :, :]
    return scores[..., 0, :, :, :, :]


def _set_below(diagonal, below):
    """Diagonal blocks [..., 2n, s, s] in pairs, and the block below each pair, as [..., n, 2s, 2s]."""
    upper = jnp.concatenate([diagonal[..., 0::2, :, :], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[..., 1::2, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _product(x, y):
    """x @ y for blocks [..., s, s]; blocks of up to 4 are too small to be worth a call to the matrix unit."""
    if x.shape[-1] <= 4:
        return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)
    return dot("...ij,...jk->...ik", x, y)


def _refine_inverse(X, L):
    """One Newton step, X + X (I - (I + L) X).

    It squares the residual of the inverse: what the blocks lost comes back (with equal keys and beta near 2
    their products cancel), up to the rounding of the step itself.
    """
    residual = jnp.eye(X.shape[-1], dtype=X.dtype) - X - dot("...ij,...jk->...ik", L, X)
    return X + dot("...ij,...jk->...ik", X, residual)
