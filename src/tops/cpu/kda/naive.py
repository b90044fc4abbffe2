"""The oracles: KDA token by token, and chunk by chunk in four stages, each as short as its equations.

They import nothing of the package, so that they can judge the rest; the public names add the checks.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array | np.ndarray


@partial(jax.jit, static_argnames=("scale", "output_final_state"))
def naive_recurrent_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    *,
    cu_seqlens: Array | None = None,
) -> tuple[Array, Array | None]:
    """Kimi Delta Attention by its recurrence, one token after the other.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        g: [B, T, HV, K], log decay in nats, <= 0.
        beta: [B, T, HV].
        scale: a number; None is K ** -0.5.
        initial_state: [N, HV, K, V], or None for zeros; N is the number of sequences (B when dense). Of one
            sequence also [HV, K, V].
        output_final_state: whether to return the final state.
        cu_seqlens: int32 or int64 [N + 1]; packs N sequences into B = 1, tokens from cu_seqlens[-1] on are
            padding.

    Returns:
        o [B, T, HV, V] in v's dtype, zero at padding, and the final state [N, HV, K, V] or None, in the
        arithmetic's dtype, promote_types(q.dtype, float32).

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.naive.naive_recurrent_kda`.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = K**-0.5 if scale is None else scale
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = jnp.zeros((N, HV, K, V), dtype) if initial_state is None else initial_state.astype(dtype)
    q, k = (jnp.repeat(x, HV // H, axis=2) for x in (q, k))

    def token(S, x):
        q, k, v, g, beta = (y.astype(dtype) for y in x)
        S = jnp.exp(g)[..., None] * S
        error = v - _matmul("...k,...kv->...v", k, S)
        S = S + beta[..., None, None] * k[..., None] * error[..., None, :]
        return S, scale * _matmul("...k,...kv->...v", q, S)

    def packed_token(states, x):
        n, *x = x
        S, o = token(states[n], x)
        return states.at[n].set(S, mode="drop"), jnp.where(n < N, o, 0)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)]
    if cu_seqlens is None:
        S, o = lax.scan(token, S, tokens)
    else:
        # The sequence of each token; N at padding, which `drop` leaves out.
        n = jnp.searchsorted(cu_seqlens[1:], jnp.arange(T), side="right")
        S, o = lax.scan(packed_token, S, [n, *(x[:, 0] for x in tokens)])
        o = o[:, None]
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), S if output_final_state else None


@partial(jax.jit, static_argnames=("scale", "output_final_state", "chunk_size"))
def naive_chunk_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: float | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    *,
    cu_seqlens: Array | None = None,
) -> tuple[Array, Array | None]:
    """Kimi Delta Attention chunk by chunk: the four stages, with every matrix and every decay written out.

        Aqk[i,j] = sum_d q_i k_j D(i<-j), j <= i      L[i,j] = beta_i sum_d k_i k_j D(i<-j), j < i     stage 1
        Akk = (I + L)^-1      w = Akk (beta k D(i<-0))      u = Akk (beta v)                           stage 2
        v_new = u - w S       S <- D(C<-0) S + (k D(C<-j))^T v_new                                     stage 3
        o = scale * ((q D(i<-0)) S + Aqk v_new)                                                        stage 4

    with D(i<-j) = exp(g_{j+1} + ... + g_i), a factor a channel. A chunk's decays take [C, C, K] a head.

    Args:
        q, k, v, g, beta, ...: what is not named below is as for `naive_recurrent_kda`.
        chunk_size: C, at least 1.

    Returns:
        What `naive_recurrent_kda` returns.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.naive.naive_chunk_kda`.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scale = K**-0.5 if scale is None else scale
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    S = jnp.zeros((N, HV, K, V), dtype) if initial_state is None else initial_state.astype(dtype)
    tokens = [jnp.repeat(q, HV // H, axis=2), jnp.repeat(k, HV // H, axis=2), v, g, beta[..., None]]
    if (
        cu_seqlens is not None
    ):  # each sequence in a row of its own; behind its end nothing is written or decays
        token = cu_seqlens[:-1, None] + jnp.arange(T)
        inside = (token < cu_seqlens[1:, None])[..., None, None]
        tokens = [jnp.where(inside, x[0, jnp.minimum(token, T - 1)], 0) for x in tokens]
    C, NT = chunk_size, -(-T // chunk_size)
    tokens = [jnp.pad(x, [(0, 0), (0, NT * C - T), (0, 0), (0, 0)]) for x in tokens]
    chunks = [
        jnp.moveaxis(x.reshape(N, NT, C, HV, -1), (1, 3), (0, 2)) for x in tokens
    ]  # [NT, N, HV, C, ...]
    i, j = jnp.arange(C)[:, None], jnp.arange(C)

    def chunk(S, x):
        q, k, v, g, beta = (y.astype(dtype) for y in x)
        a = jnp.exp(g)[..., :, None, :]  # of token i, for every j
        D = jnp.cumprod(
            jnp.where((i > j)[..., None], a, 1), axis=-3
        )  # D(i<-j) at [i, j], 1 above the diagonal
        D_in = jnp.cumprod(jnp.exp(g), axis=-2)
        Aqk = jnp.where(i >= j, _matmul("...ik,...jk,...ijk->...ij", q, k, D), 0)
        L = jnp.where(i > j, beta * _matmul("...ik,...jk,...ijk->...ij", k, k, D), 0)
        Akk = inverse(L)
        w, u = (
            _matmul("...ij,...jk->...ik", Akk, beta * k * D_in),
            _matmul("...ij,...jv->...iv", Akk, beta * v),
        )
        v_new = u - _matmul("...ik,...kv->...iv", w, S)
        o = _matmul("...ik,...kv->...iv", q * D_in, S) + _matmul("...ij,...jv->...iv", Aqk, v_new)
        S = D_in[..., -1, :, None] * S + _matmul("...jk,...jv->...kv", k * D[..., -1, :, :], v_new)
        return S, scale * o

    def inverse(L):
        """(I + L)^-1 row by row, X_i = I_i - sum_j L_ij X_j; X_j is 0 until it is made."""
        identity = jnp.broadcast_to(jnp.eye(C, dtype=dtype), L.shape)

        def row(i, X):
            L_i = lax.dynamic_index_in_dim(L, i, -2)
            X_i = lax.dynamic_index_in_dim(identity, i, -2) - _matmul("...ij,...jk->...ik", L_i, X)
            return lax.dynamic_update_index_in_dim(X, X_i, i, X.ndim - 2)

        return lax.fori_loop(0, C, row, jnp.zeros_like(identity))

    S, o = lax.scan(chunk, S, chunks)
    o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(N, NT * C, HV, V)[:, :T]
    if cu_seqlens is not None:  # back into one row; padding belongs to no sequence
        n = jnp.searchsorted(cu_seqlens[1:], jnp.arange(T), side="right")
        o = jnp.where((n < N)[:, None, None], o[n, jnp.arange(T) - cu_seqlens[n]], 0)[None]
    return o.astype(v.dtype), S if output_final_state else None


_matmul = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
