"""Chunked Kimi Delta Attention (KDA), forward, in pure JAX: the reference for people who write KDA kernels."""

from .chunk import chunk_kda
from .chunk_fwd import ChunkKDAForward, chunk_kda_fwd
from .chunking import prepare_chunk_indices, prepare_chunk_offsets
from .naive import naive_recurrent_kda

__all__ = [
    "ChunkKDAForward",
    "chunk_kda",
    "chunk_kda_fwd",
    "naive_recurrent_kda",
    "prepare_chunk_indices",
    "prepare_chunk_offsets",
]
