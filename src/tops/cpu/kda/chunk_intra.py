"""Stage 1: the two triangles inside a chunk, Aqk and Akk."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .decay import double, halves
from .dot import dot


class Intra(NamedTuple):
    """What stage 1 hands on; the decayed q and k are what the doubling ends with."""

    Aqk: jax.Array  # [..., C, C]  scale * sum_d q_i k_j D(i<-j), j <= i
    Akk: jax.Array  # [..., C, C]  (I + L)^-1
    qg: jax.Array  # [..., C, K]   q_i * D(i<-0)
    k_in: jax.Array  # [..., C, K] k_i * D(i<-0)
    kg: jax.Array  # [..., C, K]   k_j * D(C<-j)
    decay: jax.Array  # [..., K]   D(C<-0)


def intra(q, k, a, beta, scale):
    """The causal scores of one chunk and the inverse of its delta-rule system.

        Aqk[i,j] = scale * sum_d q_i k_j D(i<-j)      j <= i
        L[i,j]   = beta_i * sum_d k_i k_j D(i<-j)     j <  i
        Akk      = (I + L)^-1

    q, k [..., C, K], with leading dimensions that broadcast against a's; a = exp(g) [..., C, K];
    beta [..., C]; C a power of two. Returns an `Intra`.

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
    return Intra(Aqk, Akk, rows[..., 0, :, :], rows[..., 1, :, :], cols, total[..., 0, :])


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
