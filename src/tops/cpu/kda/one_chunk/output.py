"""Stage 4: the output."""

import jax.numpy as jnp

from .xla import matmul, matmul_nt, matmul_tn


def output(qg_S, Aqk, v_new):
    """qg S + Aqk v_new, [..., C, V]: o / scale; o itself where both hold scale, as FLA's Aqk does."""
    return qg_S + matmul(Aqk, v_new)


def output_backward(Aqk, d_o):
    """d_v_new = Aqk^T d_o. The cotangent of qg_S is d_o itself."""
    return matmul_tn(Aqk, d_o)


def d_scores(v_new, d_o):
    """d_Aqk = tril(d_o v_new^T), [..., C, C]. (The page's `backward` has it of `Intra.read_backward`.)"""
    return jnp.tril(matmul_nt(d_o, v_new))
