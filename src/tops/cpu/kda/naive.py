"""The oracle: KDA token by token, as short as its equations.

Imports nothing of the package, so that it can judge the rest; the package's public name adds the checks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.jit, static_argnames=("scale", "output_final_state"))
def naive_recurrent_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
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
        initial_state: [N, HV, K, V], or None for zeros; N is the number of sequences (B when dense).
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


_matmul = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
