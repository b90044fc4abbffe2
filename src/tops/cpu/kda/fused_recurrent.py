"""Token by token with `chunk_kda`'s options: the decode path."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, chunking
from .activations import Activations, activate
from .one_chunk.xla import dot
from .rounding import storage


def fused_recurrent_kda(
    q,
    k,
    v,
    g,
    beta,
    A_log=None,
    dt_bias=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    lower_bound=None,
    state_v_first=False,
    cu_seqlens=None,
    *,
    safe_gate=False,
    output_dtype=None,
    transpose_state_layout=None,
):
    """What `chunk_kda` computes, one token after the other: for a few tokens a sequence.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Args:
        As for `chunk_kda`, without its chunks; without `output_dtype`, o has v's dtype. One token of each
        of N sequences is a call with cu_seqlens = arange(N + 1) or, faster still, a dense call with B = N and
        T = 1.

    Returns:
        o [B, T, HV, V] in `output_dtype`, zero at padding, and the final state [N, HV, K, V] or None, in the
        arithmetic's dtype, promote_types(q.dtype, float32).

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.fused_recurrent.fused_recurrent_kda`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    cu_seqlens = checks.listed(cu_seqlens)
    scale = checks.forward(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens)
    A_log, dt_bias = checks.gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate, g)
    activations = Activations(
        qk_l2norm=use_qk_l2norm_in_kernel,
        gate=use_gate_in_kernel,
        lower_bound=lower_bound,
        beta_scale=checks.sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )
    o, final_state = _scan_tokens(
        *(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens),
        **dict(scale=scale, activations=activations, state_v_first=state_v_first),
        output_dtype=checks.storage(output_dtype, "output_dtype") or v.dtype,
    )
    return o, final_state if output_final_state else None


@partial(jax.jit, static_argnames=("scale", "activations", "state_v_first", "output_dtype"))
def _scan_tokens(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
    *, scale, activations, state_v_first, output_dtype,
):  # fmt: skip
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if packed else B
    states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)

    def compute(S, q, k, v, g, beta):
        q, k, v, g, beta = (y[:, None].astype(dtype) for y in (q, k, v, g, beta))  # [B, 1, HV, ...]
        q, k, g, beta = activate(q, k, g, beta, A_log, dt_bias, activations, storage(None))
        q, k, v, g, beta = (chunking.split_heads(y, HV)[..., 0, :] for y in (q, k, v, g, beta[..., None]))
        S, o = one_token(S, q, k, v, g, beta, scale)
        return S, o.astype(output_dtype)

    def pad(S, q, k, v, g, beta):
        return S, jnp.zeros((B, HV, V), output_dtype)

    def step(states, token):
        n, *x = token
        S = chunking.read_state(states, n, packed)
        if packed:  # padding belongs to no sequence, n = N: it may not touch the state of the last
            S, o = lax.cond(n < N, compute, pad, S, *x)
        else:
            S, o = compute(S, *x)
        return chunking.write_state(states, S, n, packed), o

    token = jnp.arange(T)
    sequence = chunking.sequence_of_token(cu_seqlens, token) if packed else jnp.zeros(T, int)
    inputs = (jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta))
    states, o = lax.scan(step, states, (sequence, *inputs))
    return jnp.moveaxis(o, 0, 1), chunking.turn(states, state_v_first)


def one_token(S, q, k, v, g, beta, scale):
    """The recurrence: S [..., K, V], q, k, g [..., K], v [..., V], beta [..., 1] to (S_t, o_t [..., V])."""
    S = jnp.exp(g)[..., None] * S
    error = v - dot("...k,...kv->...v", k, S)
    S = S + k[..., None] * (beta * error)[..., None, :]
    return S, scale * dot("...k,...kv->...v", q, S)
