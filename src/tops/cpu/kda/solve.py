"""The triangular system of a chunk, (I + L) y = r, solved by substitution: nobody needs Akk = (I + L)^-1."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .dot import dot, once, pick, spread


def solve(chunk, beta, r):
    """y = Akk r without Akk, and what q reads of y: z_i = sum_j q_i . k_j D(i<-j) y_j.

        y_i = r_i - beta_i sum_j k_i . k_j D(i<-j) y_j      j < i

    chunk: an `Intra`; beta [..., C], r [..., C, V]. Returns y and z, [..., C, V]; without q's rows in the
    chunk, z is what nobody should read.

    Forward substitution, by blocks. Inside a block (I + L)^-1 is applied; what a first half leaves for the
    second, and for its queries, is one product.
    """
    y, z = _substitute(chunk.L, chunk.inverse, chunk.below, spread(beta[..., None], -1, r.shape[-1]), r)
    y = lax.optimization_barrier(y)  # its blocks are joined once, not for every product that reads them
    *blocks, b, _ = chunk.L.shape
    of_q = pick(chunk.inside.reshape(*blocks, b, -1, b), -2, 0)
    own = dot("...ij,...jv->...iv", of_q, y.reshape(*blocks, b, -1))
    return y, z + own.reshape(y.shape)


def _substitute(L, inverse, below, beta, r):
    """`solve` with the inverse of every block at hand, but for what q reads inside the blocks."""
    n = inverse.shape[-3]
    if n == 1:
        y = _apply(L[..., 0, :, :], inverse[..., 0, :, :], r)
        return y, jnp.zeros_like(y)
    L_1, L_2 = jnp.split(L, 2, axis=-3)
    inverse_1, inverse_2 = jnp.split(inverse, 2, axis=-3)
    below_1, below_2 = ([jnp.split(x, 2, axis=-3)[i] for x in below[:-1]] for i in range(2))
    beta_1, beta_2 = jnp.split(beta, 2, axis=-2)
    r_1, r_2 = jnp.split(r, 2, axis=-2)
    y_1, z_1 = _substitute(L_1, inverse_1, below_1, beta_1, r_1)
    seen = dot("...ij,...jv->...iv", below[-1][..., 0, :, :], y_1)
    seen = seen.reshape(*r_2.shape[:-1], -1, r_2.shape[-1])
    R = seen.shape[-2]
    y_2, z_2 = _substitute(L_2, inverse_2, below_2, beta_2, r_2 - beta_2 * pick(seen, -2, R - 1))
    return jnp.concatenate([y_1, y_2], axis=-2), jnp.concatenate([z_1, z_2 + pick(seen, -2, 0)], axis=-2)


@jax.custom_jvp
def _apply(L, inverse, r):
    """(I + L)^-1 r, with the inverse at hand."""
    return dot("...ij,...jv->...iv", inverse, r)


@_apply.defjvp
def _apply_jvp(primals, tangents):
    """dy = (I + L)^-1 (dr - dL y): the gradient is two products, without those of `invert`.

    The inverse's own tangent is left out: dL holds it.
    """
    L, inverse, r = primals
    dL, _, dr = tangents
    y = _apply(L, inverse, r)
    apply = partial(dot, "...ij,...jv->...iv", inverse)
    _, dy = jax.jvp(apply, (r,), (dr - dot("...ij,...jv->...iv", dL, y),))
    return y, dy


@jax.custom_jvp
def invert(L):
    """(I + L)^-1 of strictly lower triangles [..., b, b], row by row: X_i = I_i - sum_j L_ij X_j."""
    b = L.shape[-1]
    columns = jnp.moveaxis(L.reshape(L.shape[0], -1, b, b), (0, 1), (-2, -1))  # every block in one vector

    # A loop, not b rows written out: XLA compiles by the kernel. X_j is 0 until it is made.
    def add_row(i, X):
        L_i = lax.dynamic_index_in_dim(columns, i, keepdims=False, allow_negative_indices=False)
        j = jnp.arange(b)[:, None, None]
        L_i = jnp.where(j < i, L_i, 0)  # a beta of NaN makes NaN of the zeros above the diagonal
        row = jnp.broadcast_to((j == i).astype(L.dtype), X.shape[1:])
        for L_ij, X_j in zip(L_i, X, strict=True):
            row = row - L_ij * X_j
        return lax.dynamic_update_index_in_dim(X, once(row), i, 0, allow_negative_indices=False)

    X = lax.fori_loop(0, b, add_row, jnp.zeros_like(columns))
    return jnp.moveaxis(X, (-2, -1), (0, 1)).reshape(L.shape)


@invert.defjvp
def _invert_jvp(primals, tangents):
    """dX = -X dL X: the gradient is two products, where that of the rows is a kernel an entry of L."""
    X = invert(*primals)
    return X, -dot("...ij,...jk->...ik", dot("...ij,...jk->...ik", X, *tangents), X)
