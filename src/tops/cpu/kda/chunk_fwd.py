"""The chunked forward with every tensor that its stages make."""

from typing import NamedTuple

import jax

from . import checks, chunking, contracts
from .activations import Activations
from .scan import Config, scan_chunks
from .types import Array, DType, Scalar, Sequences


class ChunkKDAForward(NamedTuple):
    """The tensors of FLA's chunked forward, in FLA's order; None where they were not asked for."""

    o: jax.Array  # [B, T, HV, V]
    final_state: jax.Array | None  # [N, HV, K, V]
    g: jax.Array | None  # [B, T, HV, K]  chunk-local cumulative sum of the log decays, log2
    Aqk: jax.Array | None  # [B, T, HV, C]  row i of its chunk's matrix at token i
    Akk: jax.Array | None  # [B, T, HV, C]
    w: jax.Array | None  # [B, T, HV, K]
    u: jax.Array | None  # [B, T, HV, V]
    qg: jax.Array | None  # [B, T, HV, K]
    kg: jax.Array | None  # [B, T, HV, K]
    v_new: jax.Array | None  # [B, T, HV, V]
    h: jax.Array | None  # [B, NT, HV, K, V]  the state that enters each chunk
    initial_state: jax.Array | None  # as it came


def chunk_kda_fwd(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: Scalar | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    cu_seqlens_cpu: Sequences | None = None,
    chunk_indices: Array | None = None,
    chunk_size: int = 64,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    cp_context: None = None,
    use_graph: bool = False,
    chunk_offsets: Array | None = None,
    *,
    storage_dtype: DType | None = None,
    output_dtype: DType | None = None,
    transpose_state_layout: bool | None = None,
) -> ChunkKDAForward:
    """The chunked KDA forward with every tensor that its four stages make.

        Aqk, Akk     the causal scores of a chunk, the inverse of its delta-rule system    stage 1
        w, u         w = Akk (beta k D(i<-0)), u = Akk (beta v)                            stage 2
        v_new, h     v_new = u - w S, S <- D(C<-0) S + kg^T v_new; h is S on entry         stage 3
        o            o = scale * qg S + Aqk v_new                                          stage 4

    with qg = q D(i<-0), kg = k D(C<-j), and D the decay over a token range.

    Args:
        q, k, v, g, beta, ...: what is not named below is as for `chunk_kda`.
        cu_seqlens_cpu: the values of cu_seqlens; where those of cu_seqlens are traced and these are known, h
            has exactly as many chunks as they make.
        chunk_indices: int32 or int64 [NT, 2] of `prepare_chunk_indices`; makes NT exact under `jit`, where it
            is (T + N * (C - 1)) // C otherwise. Rows (-1, 0) of no chunk may follow; h is zero there.
        state_v_first: states are [..., V, K] in `initial_state`, `final_state` and `h`.
        disable_recompute: return w, u, qg, kg, v_new, h, and g also of an in-kernel gate.
        return_intermediate_states: return h.
        use_graph: accepted for FLA's sake, without effect: under `jit` one program serves every cu_seqlens.
        chunk_offsets: int32 or int64 [N + 1] of `prepare_chunk_offsets`, or None; without effect.
        storage_dtype: round to it what FLA's kernels store in k's dtype (Aqk, Akk, w, u, qg, kg, v_new, h)
            and the operands that they round before a product; None keeps the arithmetic's dtype.
        output_dtype: the dtype of o; None is v's.

    Returns:
        `ChunkKDAForward`. o has `output_dtype`; final_state and g have the arithmetic's; the others have
        `storage_dtype`, or else the arithmetic's. All are zero where no sequence has a token or a chunk.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk_fwd.chunk_kda_fwd`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(
        output_final_state=output_final_state,
        use_gate_in_kernel=use_gate_in_kernel,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )
    checks.no_context(cp_context)
    checks.graph(use_graph, cu_seqlens)
    fields = ("o", "Aqk", "Akk")
    if disable_recompute or not use_gate_in_kernel:
        fields += ("g",)
    if disable_recompute:
        fields += ("w", "u", "qg", "kg", "v_new")
    if disable_recompute or return_intermediate_states:
        fields += ("h",)
    final_state, made = forward(
        *(q, k, v, g, beta, scale, initial_state, state_v_first),
        *((cu_seqlens, cu_seqlens_cpu, chunk_indices, chunk_offsets), chunk_size),
        *(A_log, dt_bias, Activations(gate=use_gate_in_kernel, lower_bound=lower_bound)),
        *(safe_gate, fields, storage_dtype, output_dtype),
        o_like=v,
    )
    made["final_state"] = final_state if output_final_state else None
    made["initial_state"] = initial_state
    return ChunkKDAForward(**{field: made.get(field) for field in ChunkKDAForward._fields})


def forward(
    q, k, v, g, beta, scale, initial_state, state_v_first, packing, chunk_size,
    A_log, dt_bias, activations, safe_gate, fields, storage_dtype, output_dtype, o_like,
):  # fmt: skip
    """(final_state, {field: tensor}) after the checks: what `chunk_kda_fwd` and `chunk_kda` share.

    `packing` is cu_seqlens, cu_seqlens_cpu, chunk_indices, chunk_offsets. Without an output_dtype, o has
    that of `o_like`.
    """
    cu_seqlens, cu_seqlens_cpu, chunk_indices, chunk_offsets = packing
    cu_seqlens = checks.listed(cu_seqlens)
    scale = contracts.forward(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, q.shape[1])
    checks.chunk_offsets(chunk_offsets, cu_seqlens, chunk_size)
    known = checks.known_sequences(cu_seqlens, cu_seqlens_cpu)
    A_log, dt_bias = contracts.gate(activations.gate, A_log, dt_bias, activations.lower_bound, safe_gate, g)
    storage_dtype = checks.storage(storage_dtype)
    output_dtype = checks.storage(output_dtype, "output_dtype") or o_like.dtype
    NT = chunking.num_chunks(q.shape[1], cu_seqlens, chunk_indices, chunk_size)
    packed = cu_seqlens is not None
    final_state, made = scan_chunks(
        *(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias),
        NT=NT,
        state_v_first=state_v_first,
        config=Config(chunk_size, scale, activations, fields, storage_dtype, output_dtype, packed),
    )
    if "h" in made:
        NT = chunking.exact_num_chunks(q.shape[1], known, chunk_indices, chunk_size)
        made["h"] = made["h"][:, :NT]
    return final_state, made
