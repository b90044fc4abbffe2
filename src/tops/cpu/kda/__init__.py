"""Chunked Kimi Delta Attention (KDA) in pure JAX: the reference for people who write KDA kernels."""

from . import chunking, contracts, naive
from .chunk import chunk_kda
from .chunk_bwd import ChunkKDABackward, chunk_kda_bwd, chunk_kda_bwd_dAv, chunk_kda_bwd_wy_dqkg_fused
from .chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from .chunk_fwd import ChunkKDAForward, chunk_kda_fwd
from .chunk_intra import chunk_kda_bwd_intra, chunk_kda_fwd_intra
from .chunk_o import chunk_gla_fwd_o_gk
from .context_parallel import context_parallel_kda
from .fused_recurrent import fused_recurrent_kda, fused_recurrent_kda_fwd
from .gate import (
    chunk_local_cumsum,
    fused_kda_gate,
    kda_gate_bwd,
    kda_gate_chunk_cumsum,
    kda_gate_fwd,
    naive_kda_gate,
    naive_kda_lowerbound_gate,
)
from .wy_fast import recompute_w_u_fwd

naive_chunk_kda = contracts.guarded(naive.naive_chunk_kda, contracts.oracle_in_chunks)
naive_recurrent_kda = contracts.guarded(naive.naive_recurrent_kda, contracts.oracle)
prepare_lens = contracts.guarded(chunking.prepare_lens, contracts.index_helper)
prepare_chunk_offsets = contracts.guarded(chunking.prepare_chunk_offsets, contracts.index_helper)
prepare_chunk_indices = contracts.guarded(chunking.prepare_chunk_indices, contracts.known_index_helper)

__all__ = [
    "ChunkKDABackward",
    "ChunkKDAForward",
    "chunk_gated_delta_rule_bwd_dhu",
    "chunk_gated_delta_rule_fwd_h",
    "chunk_gla_fwd_o_gk",
    "chunk_kda",
    "chunk_kda_bwd",
    "chunk_kda_bwd_dAv",
    "chunk_kda_bwd_intra",
    "chunk_kda_bwd_wy_dqkg_fused",
    "chunk_kda_fwd",
    "chunk_kda_fwd_intra",
    "chunk_local_cumsum",
    "context_parallel_kda",
    "fused_kda_gate",
    "fused_recurrent_kda",
    "fused_recurrent_kda_fwd",
    "kda_gate_bwd",
    "kda_gate_chunk_cumsum",
    "kda_gate_fwd",
    "naive_chunk_kda",
    "naive_kda_gate",
    "naive_kda_lowerbound_gate",
    "naive_recurrent_kda",
    "prepare_chunk_indices",
    "prepare_chunk_offsets",
    "prepare_lens",
    "recompute_w_u_fwd",
]
