"""Stage 3: the state from chunk to chunk."""

from .xla import inner, matmul, matmul_nt, matmul_tn


def next_state(S, decay, kg, v_new):
    """S_out = D(C<-0) S + kg^T v_new; S [..., K, V], decay [..., K], kg [..., C, K], v_new [..., C, V]."""
    return decay[..., None] * S + matmul_tn(kg, v_new)


def next_state_backward(S, decay, kg, v_new, d_S_out):
    """The cotangents of what `next_state` is given, in its order.

    d_S = decay d_S_out      d_decay = sum_v S d_S_out      d_kg = v_new d_S_out^T      d_v_new = kg d_S_out
    """
    return decay[..., None] * d_S_out, inner(S, d_S_out), matmul_nt(v_new, d_S_out), matmul(kg, d_S_out)


def u_less_w_S(u, w, S, store):
    """v_new = u - w S, as FLA's kernel makes it; `store` rounds what it stores."""
    return store(u - matmul(w, store(S)))


def u_less_w_S_backward(w, d_v_new):
    """d_S = -w^T d_v_new. The cotangent of u is d_v_new itself."""
    return -matmul_tn(w, d_v_new)
