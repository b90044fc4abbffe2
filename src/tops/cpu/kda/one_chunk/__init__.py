"""One chunk: its four stages, the adjoint of each, and the stages as FLA's kernels round them.

S [..., K, V] is the state that enters, q, k, g [..., C, K], g in nats, v [..., C, V], beta [..., C].
D(i<-j) is the decay from token j to token i, D(i<-0) that of the state that enters.

    1  intra    qg = q D(i<-0)      k_in = k D(i<-0)      kg = k D(C<-j)      decay = D(C<-0)
                Aqk[i,j] = sum_d q_i k_j D(i<-j), j <= i      A[i,j] = sum_d k_i k_j D(i<-j), j < i
    2  WY       v_new = (I + beta A)^-1 beta (v - k_in S) = beta e      e = v - k_in S - A v_new
    3  state    S_out = decay S + kg^T v_new
    4  output   o = scale (qg S + Aqk v_new)

and backwards, from d_S_out and with d_o <- scale d_o:

    4  output   d_v_new  = Aqk^T d_o
    3  state    d_v_new += kg d_S_out      d_kg = v_new d_S_out^T      d_decay = sum_v S d_S_out
    2  WY       d_r = (I + beta A)^-T d_v_new, of beta (v - k_in S)      d_v = beta d_r      d_beta = d_r . e
       reads    d_qg = d_o S^T        d_Aqk = tril(d_o v_new^T)
                d_k_in = -d_v S^T     d_A = -tril(d_v v_new^T, -1)
                d_S = decay d_S_out + qg^T d_o - k_in^T d_v
    1  intra    d_q, d_k, d_g: the doubling, level by level backwards
"""

import jax.numpy as jnp

from .decay import from_start
from .intra import intra, intra_backward
from .output import output, output_backward
from .state import next_state, next_state_backward, u_less_w_S
from .wy import inverse_of, w_u, write, write_backward
from .xla import matmul


def forward(S, q, k, v, g, beta, scale):
    """S_out, {o, v_new, e}, and stage 1's `Intra`.

    Without q there is no output: o is None, everything else is the same.
    """
    chunk = intra(q, k, jnp.exp(g))  # stage 1
    qg_S, k_in_S = chunk.read(S)
    e, v_new = write(chunk.A, beta, v - k_in_S)  # stage 2
    S_out = next_state(S, chunk.decay, chunk.kg, v_new)  # stage 3
    o = None if q is None else scale * output(qg_S, chunk.Aqk, v_new)  # stage 4
    return S_out, dict(o=o, v_new=v_new, e=e), chunk


def backward(S, e, q, k, g, beta, scale, d_S_out, d_o):
    """The cotangents of S, q, k, v, g and beta, from those of the state that leaves the chunk and of o.

    e [..., C, V] is `forward`'s, v_new = beta e. Without q there is no d_o, and d_q is None.
    """
    a = jnp.exp(g)
    # One sum is faster; the halves serve the last bits of a forward, which a gradient does not need.
    chunk, v_new = intra(q, k, a, in_halves=False), beta[..., None] * e
    d_v_new = 0
    if q is not None:
        d_o = scale * d_o
        d_v_new = output_backward(chunk.Aqk, d_o)  # stage 4
    d_S, d_decay, d_kg, d_of_state = next_state_backward(S, chunk.decay, chunk.kg, v_new, d_S_out)  # stage 3
    d_v, d_beta = write_backward(chunk.A, beta, e, d_v_new + d_of_state)  # stage 2
    # The rest of stages 4 and 2: q reads qg S + Aqk v_new, k reads k_in S + A v_new.
    d_S_read, d_read = chunk.read_backward(S, v_new, d_o, -d_v)
    d_q, d_k, d_g = intra_backward(chunk, q, k, a, d_read, d_kg, d_decay)  # stage 1
    return d_S + d_S_read, d_q, d_k, d_v, d_g, d_beta


def as_fla(S, q, k, v, g, beta, scale, store, store_beta_k):
    """`forward` in FLA's order of operations; `store` rounds what its kernels store and what they round
    before a product, `store_beta_k` the product beta k."""
    a = jnp.exp(g)
    chunk = intra(q, k, a)  # stage 1
    beta_k_in = store_beta_k(beta[..., None] * k) * from_start(a)
    tensors = matrices(chunk, v, beta, scale, store, beta_k_in)  # stages 1 and 2
    v_new = u_less_w_S(tensors["u"], tensors["w"], S, store)  # stage 3
    S_out = next_state(S, chunk.decay, tensors["kg"], v_new)
    o = output(scale * matmul(tensors["qg"], store(S)), tensors["Aqk"], v_new)  # stage 4
    return S_out, tensors | dict(o=o, v_new=v_new)


def matrices(chunk, v, beta, scale, store, beta_k_in):
    """What FLA's stages 1 and 2 hand on and `forward` does without: Aqk, with scale, Akk, w, u, qg, kg."""
    tensors = dict(Aqk=store(scale * chunk.Aqk), Akk=store(inverse_of(chunk.A, beta)))
    tensors |= dict(qg=store(chunk.qg), kg=store(chunk.kg))
    tensors["w"], tensors["u"] = w_u(tensors["Akk"], beta_k_in, v, beta, store)
    return tensors
