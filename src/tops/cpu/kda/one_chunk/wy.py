"""Stage 2: what the tokens of a chunk write."""

import jax.numpy as jnp

from .triangle import inverse, invert_blocks, solve, solve_transposed
from .xla import barrier, inner, matmul, matmul_nt, matmul_tn


def write(A, beta, r):
    """The error e = v - k_in S - A v_new of each token, and v_new = beta e, from r = v - k_in S.

        e = (I + A beta)^-1 r      v_new = (I + beta A)^-1 beta r

    The two are one, since (I + beta A) beta = beta (I + A beta): a diagonal beta goes from side to side.
    v_new is u - w S without u, w and Akk, and rounds less. Since e is solved for, a gradient of beta needs no
    quotient. A is a `BlockLower`, beta [..., C], r [..., C, V].
    """
    L = A.scale_columns(beta)
    # The barrier makes XLA join the blocks of e once, not once for every product that reads e.
    e = barrier(solve(L, invert_blocks(L), r))
    return e, beta[..., None] * e


def write_backward(A, beta, e, d_v_new):
    """The cotangents of v and of beta; d_r is that of beta r, the right-hand side.

    d_r = (I + beta A)^-T d_v_new      d_v = beta d_r      d_beta = d_r . e = d_r . (v - k_in S - A v_new)
    """
    L = A.scale_rows(beta)
    d_r = solve_transposed(L, invert_blocks(L), d_v_new)
    return beta[..., None] * d_r, inner(d_r, e)


def inverse_of(A, beta):
    """Akk = (I + beta A)^-1, the matrix [..., C, C]."""
    return inverse(A.scale_rows(beta))


def w_u(Akk, beta_k_in, v, beta, store):
    """w = Akk (beta k_in) [..., C, K] and u = Akk (beta v) [..., C, V]; `store` rounds what FLA stores."""
    return store(matmul(Akk, store(beta_k_in))), store(matmul(Akk, store(beta[..., None] * v)))


def w_u_backward(Akk, k_in, v, beta, d_w, d_u, store):
    """The cotangents of L, where Akk = (I + L)^-1, and of k_in, v and beta.

    d_k_in = beta Akk^T d_w      d_v = beta Akk^T d_u      d_beta = Akk^T d_w . k_in + Akk^T d_u . v
    d_Akk  = d_w (beta k_in)^T + d_u (beta v)^T            d_L    = -tril(Akk^T d_Akk Akk^T, -1)
    """
    d_beta_k_in, d_beta_v = matmul_tn(Akk, d_w), matmul_tn(Akk, d_u)
    d_beta = inner(d_beta_k_in, k_in) + inner(d_beta_v, v)
    d_Akk = (matmul_nt(d_w, store(k_in)) + matmul_nt(d_u, v)) * beta[..., None, :]
    d_L = matmul_tn(Akk, store(matmul_nt(store(jnp.tril(d_Akk, -1)), Akk)))
    return -jnp.tril(d_L, -1), beta[..., None] * d_beta_k_in, beta[..., None] * d_beta_v, d_beta
