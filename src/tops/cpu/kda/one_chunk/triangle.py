"""Lower triangles as the doubling makes them, and (I + L)^-1: applied, applied transposed, as a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .xla import materialize, matmul, matmul_tn

BLOCK = 16  # tokens of a diagonal block; the smallest chunk size


class BlockLower(NamedTuple):
    """A lower triangle [R * C, C], R rows a token: diagonal blocks, and what lies below them level by
    level."""

    diagonal: jax.Array  # [..., C/b, R * b, b] with b = BLOCK
    below: tuple  # [..., C/2s, R * s, s] for s = b, 2b, ..., C/2: the second half of 2s tokens by the first

    def matrix(self):
        """[..., R * C, C], zero above the diagonal."""
        x = self.diagonal
        for below in self.below:
            x = join_below(x, below)
        return x[..., 0, :, :]

    def scale_rows(self, beta):
        """Row i times beta_i, of one row a token; beta [..., C]."""
        diagonal, *below = self._by_blocks(beta, 1)
        return self._times(x[..., :, None] for x in (diagonal, *below))

    def scale_columns(self, beta):
        """Column j times beta_j; beta [..., C]."""
        diagonal, *below = self._by_blocks(beta, 0)
        return self._times(x[..., None, :] for x in (diagonal, *below))

    def _by_blocks(self, beta, half):
        """beta of the diagonal blocks, then of the first (0) or second (1) halves of each level's pairs."""
        lead, b = beta.shape[:-1], self.diagonal.shape[-1]
        pairs = (beta.reshape(*lead, x.shape[-3], 2, x.shape[-1]) for x in self.below)
        return beta.reshape(*lead, -1, b), *(x[..., half, :] for x in pairs)

    def _times(self, factors):
        diagonal, *below = (x * y for x, y in zip(factors, (self.diagonal, *self.below), strict=True))
        return BlockLower(diagonal, tuple(below))


def join_below(diagonal, below):
    """Pairs of diagonal blocks [..., 2n, X, s], each with the block below its first, as [..., n, 2X, 2s]."""
    upper = jnp.concatenate([diagonal[..., 0::2, :, :], jnp.zeros_like(below)], axis=-1)
    lower = jnp.concatenate([below, diagonal[..., 1::2, :, :]], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def split_below(x):
    """`join_below` undone: [..., n, 2X, 2s] to diagonal blocks [..., 2n, X, s] and those below each pair."""
    upper, lower = jnp.split(x, 2, axis=-2)
    (first, _), (below, second) = jnp.split(upper, 2, axis=-1), jnp.split(lower, 2, axis=-1)
    diagonal = jnp.stack([first, second], axis=-3)
    return diagonal.reshape(*x.shape[:-3], -1, *below.shape[-2:]), below


def solve(L, inverses, r):
    """y = (I + L)^-1 r by substitution: y_i = r_i - sum_j L_ij y_j, j < i.

    L is a `BlockLower` with one row a token, `inverses` is `invert_blocks(L)`, r [..., C, V]. Inside a
    block the inverse is applied; what a first half leaves for the second is one product.
    """
    if inverses.shape[-3] == 1:
        return matmul(inverses[..., 0, :, :], r)
    (L_1, L_2), (inverse_1, inverse_2), (r_1, r_2) = _halves_of(L, inverses, r)
    y_1 = solve(L_1, inverse_1, r_1)
    y_2 = solve(L_2, inverse_2, r_2 - matmul(L.below[-1][..., 0, :, :], y_1))
    return jnp.concatenate([y_1, y_2], axis=-2)


def solve_transposed(L, inverses, d):
    """y = (I + L)^-T d, by the same substitution from the last token to the first."""
    if inverses.shape[-3] == 1:
        return matmul_tn(inverses[..., 0, :, :], d)
    (L_1, L_2), (inverse_1, inverse_2), (d_1, d_2) = _halves_of(L, inverses, d)
    y_2 = solve_transposed(L_2, inverse_2, d_2)
    y_1 = solve_transposed(L_1, inverse_1, d_1 - matmul_tn(L.below[-1][..., 0, :, :], y_2))
    return jnp.concatenate([y_1, y_2], axis=-2)


def inverse(L):
    """(I + L)^-1 as a matrix [..., C, C]: what `solve` makes of the identity."""
    *lead, n, b, _ = L.diagonal.shape
    identity = jnp.broadcast_to(jnp.eye(n * b, dtype=L.diagonal.dtype), (*lead, n * b, n * b))
    return solve(L, invert_blocks(L), identity)


def _halves_of(L, inverses, r):
    blocks = [jnp.split(x, 2, axis=-3) for x in (L.diagonal, *L.below[:-1])]
    L = [BlockLower(diagonal, tuple(below)) for diagonal, *below in zip(*blocks, strict=True)]
    return L, jnp.split(inverses, 2, axis=-3), jnp.split(r, 2, axis=-2)


def invert_blocks(L):
    """(I + L)^-1 of the diagonal blocks of a `BlockLower`, [..., C/b, b, b].

    Row by row: X_i = I_i - sum_j L_ij X_j, where X_j is 0 until it is made. The last two axes run over all
    blocks. The rows are a loop because XLA's compile time grows with the number of kernels.
    """
    shape = L.diagonal.shape
    b = shape[-1]
    L_rows = jnp.moveaxis(L.diagonal.reshape(shape[0], -1, b, b), (0, 1), (-2, -1))

    def add_row(i, X):
        L_i = lax.dynamic_index_in_dim(L_rows, i, keepdims=False, allow_negative_indices=False)
        j = jnp.arange(b)[:, None, None]
        L_i = jnp.where(j < i, L_i, 0)  # a beta of NaN makes NaN of the zeros above the diagonal
        row = jnp.broadcast_to((j == i).astype(L_rows.dtype), X.shape[1:])
        for L_ij, X_j in zip(L_i, X, strict=True):
            row = row - L_ij * X_j
        return lax.dynamic_update_index_in_dim(X, materialize(row), i, 0, allow_negative_indices=False)

    X = lax.fori_loop(0, b, add_row, jnp.zeros_like(L_rows))
    return jnp.moveaxis(X, (-2, -1), (0, 1)).reshape(shape)
