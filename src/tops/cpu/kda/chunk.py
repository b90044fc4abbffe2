"""The user-level op: chunked KDA, output and final state only."""

from typing import Any

from . import checks, contracts
from .activations import Activations
from .chunk_fwd import forward
from .types import Array, DType, Scalar, Sequences


def chunk_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: Scalar | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    cu_seqlens_cpu: Sequences | None = None,
    cp_context: None = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    chunk_indices: Array | None = None,
    chunk_size: int = 64,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    storage_dtype: DType | None = None,
    output_dtype: DType | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[Any, ...]:
    """Chunked Kimi Delta Attention: what `naive_recurrent_kda` computes, by matrix products.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Args:
        q, k: [B, T, H, K], of one dtype; float64, float32, bfloat16 or float16.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G. Like all arrays that follow, of any
            dtype that is no wider than the arithmetic's, promote_types(q.dtype, float32).
        g: [B, T, HV, K], log decay in nats, <= 0 (-inf is a reset); raw with `use_gate_in_kernel`.
        beta: [B, T, HV]; raw with `use_beta_sigmoid_in_kernel`.
        scale: a number, or a scalar array whose value is known; None is K ** -0.5.
        initial_state: [N, HV, K, V], or None for zeros; N is the number of sequences (B when dense).
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: x <- x / sqrt(sum_d x_d^2 + 1e-6) for q and k.
        use_gate_in_kernel: g <- -exp(A_log) * softplus(g + dt_bias), unless `lower_bound` is given.
        use_beta_sigmoid_in_kernel: beta <- sigmoid(beta).
        allow_neg_eigval: beta <- 2 * sigmoid(beta), in [0, 2).
        safe_gate: accepted for FLA's sake and held to its rules; this op is safe for all gates.
        lower_bound: with `use_gate_in_kernel`, g <- lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        disable_recompute: accepted for FLA's sake, without effect: a gradient keeps the same either way.
        return_intermediate_states: return h, the state that enters each chunk, as a third result.
        state_v_first: states are [..., V, K].
        cu_seqlens: int32 or int64 [N + 1], or a list; packs N sequences into B = 1, sequence n in tokens
            [cu_seqlens[n], cu_seqlens[n + 1]). Tokens from cu_seqlens[N] on are padding.
        cu_seqlens_cpu: the same values; where those of cu_seqlens are traced and these are known, h has
            exactly as many chunks as they make.
        cp_context: None; `context_parallel_kda` is the op for several devices.
        use_graph, max_num_seqs: accepted for FLA's sake and held to its rules, N = max_num_seqs with
            `use_graph`; without effect: under `jit` one program serves every cu_seqlens.
        chunk_indices: int32 or int64 [NT, 2] of `prepare_chunk_indices`; makes the number of chunks exact
            under `jit`, where it is (T + N * (C - 1)) // C otherwise. Rows (-1, 0) of no chunk may follow.
        chunk_size: C, one of 16, 32, 64, 128.
        A_log: [HV] or [1, 1, HV, 1], for the gate; may be None beside `lower_bound`.
        dt_bias: [HV * K] or [HV, K] or None, for the gate. Neither is read without `use_gate_in_kernel`.
        storage_dtype: round to it what FLA's kernels store in k's dtype, and the operands that they round
            before a product; None keeps the arithmetic's dtype.
        output_dtype: the dtype of o; None is q's. float32 holds what 16 bits would round, or overflow.
        transpose_state_layout: the deprecated name of `state_v_first`.

    Returns:
        o [B, T, HV, V] in `output_dtype`, zero at padding, and the final state [N, HV, K, V] or None, in the
        arithmetic's dtype. With `return_intermediate_states` also h [B, NT, HV, K, V], in `storage_dtype` or
        k's dtype.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk.chunk_kda`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )
    checks.no_context(cp_context)
    checks.graph(use_graph, cu_seqlens, max_num_seqs)
    activations = Activations(
        qk_l2norm=use_qk_l2norm_in_kernel,
        gate=use_gate_in_kernel,
        lower_bound=lower_bound,
        beta_scale=contracts.sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )
    fields = ("o", "h") if return_intermediate_states else ("o",)
    final_state, made = forward(
        *(q, k, v, g, beta, scale, initial_state, state_v_first),
        *((cu_seqlens, cu_seqlens_cpu, chunk_indices, None), chunk_size),
        *(A_log, dt_bias, activations, safe_gate, fields, storage_dtype, output_dtype),
        o_like=q,
    )
    results = made["o"], final_state if output_final_state else None
    if not return_intermediate_states:
        return results
    return *results, made["h"] if storage_dtype is not None else made["h"].astype(k.dtype)
