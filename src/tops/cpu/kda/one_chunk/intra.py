"""Stage 1: the decayed scores of a chunk's tokens, and q and k decayed to the two ends of the chunk."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .decay import add_to_half, double, double_backward, halves
from .triangle import BLOCK, BlockLower, join_below, split_below
from .xla import barrier, inner, materialize, matmul, matmul_nt, matmul_tn


class Intra(NamedTuple):
    """What stage 1 hands on.

    One product a level makes the scores of q and of k: their rows take turns, row 2i is q_i's, 2i + 1 k_i's.
    Only this file knows that. Without q there are k's rows alone, and qg and Aqk are None.
    """

    scores: BlockLower  # of the rows: q_i . k_j D(i<-j), j <= i, and k_i . k_j D(i<-j), j < i
    rows: jax.Array  # [..., 2C, K]: q_i D(i<-0) and k_i D(i<-0)
    kg: jax.Array  # [..., C, K]: k_j D(C<-j)
    decay: jax.Array  # [..., K]: D(C<-0)
    levels: tuple  # the rows, columns and totals that each doubling starts from, for the adjoint

    @property
    def qg(self):
        """q_i D(i<-0), [..., C, K]."""
        return self._apart(self.rows)[0]

    @property
    def k_in(self):
        """k_i D(i<-0), [..., C, K]."""
        return self._apart(self.rows)[1]

    @property
    def Aqk(self):
        """q_i . k_j D(i<-j), j <= i: the matrix [..., C, C], not scaled."""
        return None if self._R == 1 else self._scores_of(0).matrix()

    @property
    def A(self):
        """k_i . k_j D(i<-j), j < i: a `BlockLower`."""
        return self._scores_of(-1)

    def read(self, S):
        """qg S and k_in S, of S [..., K, V]."""
        return self._apart(_read_in_halves(self.rows, S))

    def read_backward(self, S, v_new, d_of_q, d_of_k):
        """The cotangents of what q and k read in all, qg S + Aqk v_new and k_in S + A v_new, taken back to

            d_S = qg^T d_of_q + k_in^T d_of_k
            d_qg = d_of_q S^T      d_Aqk = tril(d_of_q v_new^T)
            d_k_in = d_of_k S^T    d_A   = tril(d_of_k v_new^T, -1)

        d_of_q, d_of_k, v_new [..., C, V]. Returns d_S, and for `intra_backward` the other four, whose rows
        take turns. Of the scores it makes also what tril drops, which nobody reads.
        """
        d_reads = barrier(_by_turns(d_of_q, d_of_k))
        return matmul_tn(self.rows, d_reads), (matmul_nt(d_reads, S), matmul_nt(d_reads, v_new))

    def _scores_of(self, row):
        """The scores of q's rows (0) or of k's rows (-1) alone."""
        R = self._R
        return BlockLower(*jax.tree.map(lambda x: x[..., row % R :: R, :], tuple(self.scores)))

    @property
    def _R(self):
        """How many rows take turns: 2, or 1 without q."""
        return self.rows.shape[-2] // self.kg.shape[-2]

    def _apart(self, x):
        """What belongs to q's rows, None without q, and what to k's, [..., C, X] each."""
        both = x.reshape(*self.kg.shape[:-1], self._R, x.shape[-1])
        of_q = None if self._R == 1 else both[..., 0, :]
        return of_q, both[..., -1, :]


def _by_turns(q, k):
    """Rows of q and of k [..., C, X] as [..., 2C, X]."""
    if q is None:
        return k
    both = jnp.stack([q, k], axis=-2)
    return both.reshape(*q.shape[:-2], -1, q.shape[-1])


def _scores_in_halves(x, y):
    """x y^T, the sum over channels in two halves."""
    return _sum(matmul_nt(_channel_halves(x), _channel_halves(y)))


def _read_in_halves(x, S):
    """x S, with the channels summed in the same two halves."""
    x = _channel_halves(x)
    S = S.reshape(*S.shape[:-2], x.shape[-3], x.shape[-1], S.shape[-1])
    return _sum(matmul(x, S))


def _channel_halves(x):
    """x [..., X, K] as [..., 2, X, K/2]; [..., 1, X, K] for an odd K."""
    halves = x.reshape(*x.shape[:-1], math.gcd(2, x.shape[-1]), -1)
    return jnp.moveaxis(halves, -2, -3)


def _sum(z):
    return sum(z[..., i, :, :] for i in range(z.shape[-3]))


def intra(q, k, a, in_halves=True):
    """Stage 1 by doubling.

        Aqk[i,j] = sum_d q_i k_j D(i<-j), j <= i      qg = q D(i<-0)      kg = k D(C<-j)
        A[i,j]   = sum_d k_i k_j D(i<-j), j <  i      k_in = k D(i<-0)    decay = D(C<-0)

    The diagonal of Aqk is q_i . k_i, since D(i<-i) = 1; the doubling makes what lies below.

    q, k, a = exp(g) [..., C, K]; C a power of two, 16 or more; q is None where nothing is read. With
    `in_halves` the scores are sums of two halves of the channels, as `Intra.read`'s always are: a shorter sum
    rounds less. Returns an `Intra`.
    """
    scores_of = _scores_in_halves if in_halves else matmul_nt
    *lead, C, K = a.shape
    x = jnp.stack([k] if q is None else [q, k], axis=-2)
    rows = barrier((x * a[..., None, :]).reshape(*lead, -1, K))
    cols, total = k, a
    diagonals = [jnp.zeros_like(k[..., 0])] if q is None else [inner(q, k), jnp.zeros_like(k[..., 0])]
    diagonal, below, levels = jnp.stack(diagonals, axis=-1)[..., None], (), ()
    s = 1
    while s < C:
        levels += ((rows, cols, total),)
        n = C // (2 * s)
        scores = scores_of(halves(rows, n)[1], halves(cols, n)[0])
        if s < BLOCK:
            diagonal = join_below(diagonal, scores)
        else:
            below += (scores,)
        rows, cols, total = double(rows, cols, total)
        s *= 2
    return Intra(BlockLower(diagonal, below), rows, cols, total[..., 0, :], levels)


def scores_backward(q, k, a, beta, d_Aqk, d_L):
    """The cotangents of q, k, beta and g = log(a), from those of Aqk and L = beta A alone, [..., C, C]; what
    lies above their diagonals, and L's diagonal, is not read."""
    chunk, beta = intra(q, k, a, in_halves=False), beta[..., None]
    d_beta = inner(jnp.tril(d_L, -1), chunk.A.matrix())
    d_read = jnp.zeros_like(chunk.rows), _by_turns(d_Aqk, beta * d_L)
    d_q, d_k, d_g = intra_backward(chunk, q, k, a, d_read, jnp.zeros_like(k), jnp.zeros_like(chunk.decay))
    return d_q, d_k, d_beta, d_g


def intra_backward(chunk, q, k, a, d_read, d_kg, d_decay):
    """The adjoint of `intra`, level by level from the last doubling to the first.

        scores = rows_2 cols_1^T      d_rows_2 += d_scores cols_1      d_cols_1 += d_scores^T rows_2

    d_read is `Intra.read_backward`'s; of its scores, [..., R * C, C], neither what lies above the diagonal
    nor the diagonal of A is read. Returns the cotangents of q, k and g = log(a), [..., C, K].
    """
    d_rows, d_scores = d_read
    d_cols, d_total, d_diagonal = d_kg, d_decay[..., None, :], d_scores[..., None, :, :]
    for rows, cols, total in reversed(chunk.levels):
        n = total.shape[-2] // 2
        # Left alone, XLA makes a level's cotangents anew in every later level of this loop. To write them at
        # one level of three is cheapest: made anew for two they cost less than written and read.
        if n in (4, 32):
            d_rows, d_cols = materialize(d_rows), materialize(d_cols)
        d_rows, d_cols, d_total = double_backward(rows, cols, total, d_rows, d_cols, d_total)
        d_diagonal, d_below = split_below(d_diagonal)
        rows_2, cols_1 = halves(rows, n)[1], halves(cols, n)[0]
        if cols_1.shape[-2] == 1:  # blocks of one token: XLA is slow at such small products and sums
            d_rows_2 = d_below * cols_1
            d_cols_1 = sum(jnp.split(d_below * rows_2, rows_2.shape[-2], axis=-2))
        else:
            d_rows_2, d_cols_1 = matmul(d_below, cols_1), matmul_tn(d_below, rows_2)
        d_rows, d_cols = add_to_half(d_rows, 1, d_rows_2), add_to_half(d_cols, 0, d_cols_1)
    # Before the first doubling rows are q a and k a, cols k, total a; Aqk's diagonal is q . k, A's is 0.
    d_qa, d_ka = chunk._apart(d_rows)
    if q is None:
        return None, d_ka * a + d_cols, a * (k * d_ka + d_total)
    d_qk = d_diagonal[..., 0::2, :].reshape(*q.shape[:-1], 1)
    return d_qa * a + d_qk * k, d_ka * a + d_cols + d_qk * q, a * (q * d_qa + k * d_ka + d_total)
