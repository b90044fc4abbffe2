"""Chunked Kimi Delta Attention (KDA) in pure JAX: the reference for people who write KDA kernels."""

from . import checks, naive
from .chunk import chunk_kda
from .chunk_fwd import ChunkKDAForward, chunk_kda_fwd
from .chunking import prepare_chunk_indices, prepare_chunk_offsets

naive_recurrent_kda = checks.guarded(naive.naive_recurrent_kda)

__all__ = [
    "ChunkKDAForward",
    "chunk_kda",
    "chunk_kda_fwd",
    "naive_recurrent_kda",
    "prepare_chunk_indices",
    "prepare_chunk_offsets",
]
