"""The user-level op: chunked KDA, output and final state only."""

from .chunk_fwd import forward
from .gate import Activations


def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    chunk_indices=None,
    chunk_size=64,
):
    """Chunked Kimi Delta Attention: what `naive_recurrent_kda` computes, by matrix products.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, one dtype for q, k and v.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        g: [B, T, HV, K], log decay in nats, <= 0 (-inf is a reset).
        beta: [B, T, HV].
        scale: a number; None is K ** -0.5.
        initial_state: [N, HV, K, V], or None for zeros; N is the number of sequences (B when dense).
        output_final_state: whether to return the final state.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: integer [N + 1]; packs N sequences into B = 1, sequence n in tokens
            [cu_seqlens[n], cu_seqlens[n + 1]). Tokens from cu_seqlens[N] on are padding.
        chunk_indices: integer [NT, 2] of `prepare_chunk_indices`; makes the number of chunks exact
            under `jit`, where it is (T + N * (C - 1)) // C otherwise.
        chunk_size: C, one of 16, 32, 64, 128.

    Returns:
        o [B, T, HV, V] in v's dtype, zero at padding, and the final state [N, HV, K, V] or None, in the
        arithmetic's dtype, promote_types(q.dtype, float32).

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk.chunk_kda`.
    """
    final_state, made = forward(
        *(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens, chunk_indices, chunk_size),
        *(None, None, Activations(), ("o",)),
    )
    return made["o"], final_state if output_final_state else None
