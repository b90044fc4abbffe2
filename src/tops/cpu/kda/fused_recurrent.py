"""Token by token with `chunk_kda`'s options: the decode path."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, chunking, contracts
from .activations import Activations, activate
from .one_chunk.xla import dot
from .rounding import storage
from .types import Array, DType, Scalar, Sequences


def fused_recurrent_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    scale: Scalar | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    *,
    safe_gate: bool = False,
    return_intermediate_states: bool = False,
    output_dtype: DType | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[Any, ...]:
    """What `chunk_kda` computes, one token after the other: for a few tokens a sequence.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Args:
        q, k, v, g, ...: what is not named below is as for `chunk_kda`. One token of each of N sequences is a
            call with cu_seqlens = arange(N + 1) or, faster still, a dense call with B = N and T = 1.
        beta: [B, T, HV], or [B, T, HV, V], one for each value channel.
        output_dtype: the dtype of o; None is v's.
        return_intermediate_states: return the state after every token, too.

    Returns:
        o [B, T, HV, V] in `output_dtype`, zero at padding, and the final state [N, HV, K, V] or None, in the
        arithmetic's dtype, promote_types(q.dtype, float32). With `return_intermediate_states` also
        h [B, T, HV, K, V], in that dtype, zero at padding. A gradient keeps three states a token.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.fused_recurrent.fused_recurrent_kda`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        return_intermediate_states=return_intermediate_states,
    )
    cu_seqlens = checks.listed(cu_seqlens)
    arrays = q, k, v, g, beta
    scale = contracts.forward(*arrays, scale, initial_state, state_v_first, cu_seqlens, headwise_beta=True)
    A_log, dt_bias = contracts.gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate, g)
    activations = Activations(
        qk_l2norm=use_qk_l2norm_in_kernel,
        gate=use_gate_in_kernel,
        lower_bound=lower_bound,
        beta_scale=contracts.sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )
    o, final_state, h = _scan_tokens(
        *(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens),
        **dict(scale=scale, activations=activations, state_v_first=state_v_first),
        output_dtype=checks.storage(output_dtype, "output_dtype") or v.dtype,
        keep_states=return_intermediate_states,
    )
    results = o, final_state if output_final_state else None
    return (*results, h) if return_intermediate_states else results


@partial(jax.jit, static_argnames=("scale", "activations", "state_v_first", "output_dtype", "keep_states"))
def _scan_tokens(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens,
    *, scale, activations, state_v_first, output_dtype, keep_states,
):  # fmt: skip
    """o, the final states, and the state after every token or None."""
    B, T, _, K = q.shape
    beta = beta if beta.ndim == 4 else beta[..., None]
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if packed else B
    states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)

    def compute(S, q, k, v, g, beta):
        q, k, v, g, beta = (y[:, None].astype(dtype) for y in (q, k, v, g, beta))  # [B, 1, HV, ...]
        q, k, g, beta = activate(q, k, g, beta, A_log, dt_bias, activations, storage(None))
        q, k, v, g, beta = (chunking.split_heads(y, HV)[..., 0, :] for y in (q, k, v, g, beta))
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
        h = (jnp.where(n < N, S, 0) if packed else S) if keep_states else None
        return chunking.write_state(states, S, n, packed), (o, h)

    token = jnp.arange(T)
    sequence = chunking.sequence_of_token(cu_seqlens, token) if packed else jnp.zeros(T, int)
    inputs = (jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta))
    states, (o, h) = lax.scan(step, states, (sequence, *inputs))
    h = chunking.merge_states(h, state_v_first) if keep_states else None
    return jnp.moveaxis(o, 0, 1), chunking.turn(states, state_v_first), h


def one_token(S, q, k, v, g, beta, scale):
    """The recurrence: S [..., K, V], q, k, g [..., K], v [..., V], beta [..., 1 or V] to S_t and o_t."""
    S = jnp.exp(g)[..., None] * S
    error = v - dot("...k,...kv->...v", k, S)
    S = S + k[..., None] * (beta * error)[..., None, :]
    return S, scale * dot("...k,...kv->...v", q, S)


def fused_recurrent_kda_fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    initial_state: Array | None = None,
    scale: Scalar | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    ssm_state_indices: Array | None = None,
    num_accepted_tokens: Array | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    out: None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`fused_recurrent_kda` for a server, whose sequences have their states in a pool.

    Args:
        q, k, v, g, beta, ...: what is not named below is as for `fused_recurrent_kda`.
        initial_state: with `ssm_state_indices` the pool [P, HV, K, V], else [N, HV, K, V] or None for zeros.
        output_final_state: whether to return the final states where they do not replace the initial ones.
        inplace_final_state: return `initial_state` with the new states in place of the old. Nothing is
            overwritten but what `jax.jit` is told to donate.
        ssm_state_indices: int32 or int64 [N, M], or [N] for M = 1. A sequence of at most M tokens starts from
            slot [n, 0] of the pool, and its state after token t goes to slot [n, t]. An index below 0 is no
            slot: zeros are read there, and nothing is written.
        num_accepted_tokens: int32 or int64 [N], from 1 to M, or None: the sequence starts from slot
            [n, num_accepted_tokens[n] - 1], the state after the last token that a verifier accepted.
        out: None; the output is returned.

    Returns:
        o [B, T, HV, V] in v's dtype, zero at padding, and the states in the dtype of `initial_state`: with
        `inplace_final_state` the new pool, or [N, HV, K, V] without `ssm_state_indices`; else the final
        states [N, HV, K, V] in the arithmetic's dtype, or None.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.fused_recurrent.fused_recurrent_kda_fwd`.
    """
    checks.flags(
        inplace_final_state=inplace_final_state,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
    )
    cu_seqlens = checks.listed(cu_seqlens)
    arrays = q, k, v, g, beta
    given = None if ssm_state_indices is not None else initial_state
    contracts.forward(*arrays, scale, given, state_v_first, cu_seqlens, headwise_beta=True)
    contracts.pool(
        *(v, k, initial_state, state_v_first, cu_seqlens, ssm_state_indices, num_accepted_tokens),
        *(inplace_final_state, out),
    )
    pool, slots = initial_state, ssm_state_indices
    if slots is not None:
        slots = slots if slots.ndim == 2 else slots[:, None]
        initial_state = _taken(pool, slots, num_accepted_tokens)
    replaces_each = inplace_final_state and slots is not None
    o, final_state, *h = fused_recurrent_kda(
        *(*arrays, A_log, dt_bias, scale, initial_state, True, use_qk_l2norm_in_kernel, use_gate_in_kernel),
        *(use_beta_sigmoid_in_kernel, allow_neg_eigval, lower_bound, state_v_first, cu_seqlens),
        return_intermediate_states=replaces_each,
    )
    if replaces_each:
        return o, _replaced(pool, slots, *h, cu_seqlens)
    if inplace_final_state:
        return o, final_state.astype(pool.dtype)
    return o, final_state if output_final_state else None


@jax.jit
def _taken(pool, slots, accepted):
    """The state that each sequence starts from, [N, HV, K, V]."""
    last = jnp.zeros(len(slots), int) if accepted is None else accepted - 1
    slot = jnp.take_along_axis(slots, last[:, None], axis=1)[:, 0]
    return jnp.where((slot >= 0)[:, None, None, None], pool[slot], 0)


@jax.jit
def _replaced(pool, slots, h, cu_seqlens):
    """The pool with the state after each token, h [B, T, HV, K, V], in the slot of the token."""
    B, T = h.shape[:2]
    if cu_seqlens is None:
        slot = slots[:, :T].reshape(-1)
    else:
        token = jnp.arange(T)
        sequence = chunking.sequence_of_token(cu_seqlens, token)
        slot = slots.at[sequence, token - cu_seqlens[sequence]].get(mode="fill", fill_value=-1)
    slot = jnp.where(slot < 0, len(pool), slot)  # none, where nothing is written
    return pool.at[slot].set(h.reshape(B * T, *h.shape[2:]).astype(pool.dtype), mode="drop")
