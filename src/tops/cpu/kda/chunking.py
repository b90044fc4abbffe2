"""Sequences to chunks and back; the only place that knows packing.

The token axis holds one or more sequences, each cut into chunks of C tokens from its own start, so that
the last chunk of a sequence may be short. A dense batch is one sequence [0, T) in every row of B; a
packed call is N sequences in one row. A chunk is read with the rows past its end selected away, and
written without them: nothing of one sequence can reach another.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from .one_chunk.xla import hidden, sliced


class Chunks(NamedTuple):
    """Where each chunk lies, int32 [NT] each. A length of 0 marks a chunk that no sequence needs."""

    sequence: jax.Array | np.ndarray
    start: jax.Array | np.ndarray
    length: jax.Array | np.ndarray | None  # None: every chunk is whole


def max_num_chunks(T, N, C):
    """The most chunks that N sequences in T tokens can make."""
    return (T + N * (C - 1)) // C


def num_chunks(T, cu_seqlens, chunk_indices, C):
    """How many chunks a scan needs: exact when dense or listed, else a bound that every packing keeps to."""
    if cu_seqlens is None:
        return max_num_chunks(T, 1, C)
    return max_num_chunks(T, cu_seqlens.shape[0] - 1, C) if chunk_indices is None else chunk_indices.shape[0]


def exact_num_chunks(T, cu_seqlens, chunk_indices, C):
    """The same, but exact also where the values of cu_seqlens are known and no list is given."""
    if cu_seqlens is None or chunk_indices is not None or not concrete(cu_seqlens):
        return num_chunks(T, cu_seqlens, chunk_indices, C)
    return len(prepare_chunk_indices(cu_seqlens, C))


def concrete(x):
    """Whether the values of an array are known: not under a transformation."""
    return not isinstance(x, jax.core.Tracer)


def chunk_table(cu_seqlens, NT, C):
    """`Chunks` of the sequences [cu_seqlens[n], cu_seqlens[n + 1]), in sequence order."""
    cu_seqlens = cu_seqlens.astype(jnp.int32)
    offsets = prepare_chunk_offsets(cu_seqlens, C)
    index = jnp.arange(NT, dtype=jnp.int32)
    sequence = jnp.searchsorted(offsets, index, side="right").astype(jnp.int32) - 1
    sequence = jnp.minimum(sequence, cu_seqlens.shape[0] - 2)
    start = cu_seqlens[sequence] + (index - offsets[sequence]) * C
    return Chunks(sequence, start, jnp.clip(cu_seqlens[sequence + 1] - start, 0, C))


def dense_table(T, C):
    """`Chunks` of a dense batch, known before the program runs."""
    start = np.arange(0, T, C, dtype=np.int32)
    return Chunks(np.zeros_like(start), start, None if T % C == 0 else np.minimum(T - start, C))


def prepare_lens(cu_seqlens: ArrayLike) -> jax.Array:
    """The length of each sequence: [N]."""
    return jnp.diff(cu_seqlens)


def prepare_chunk_offsets(cu_seqlens: ArrayLike, chunk_size: int) -> jax.Array:
    """The index of each sequence's first chunk, and the number of chunks: [N + 1]."""
    counts = -(-prepare_lens(cu_seqlens) // chunk_size)
    return jnp.concatenate([jnp.zeros_like(counts[:1]), jnp.cumsum(counts, dtype=counts.dtype)])


def prepare_chunk_indices(
    cu_seqlens: ArrayLike, chunk_size: int, cu_seqlens_cpu: ArrayLike | None = None
) -> np.ndarray:
    """(sequence, chunk of the sequence) of every chunk, in sequence order: [NT, 2].

    NT follows from the values of cu_seqlens, or of its copy `cu_seqlens_cpu`: under `jit` those of the copy
    may be known.
    """
    known = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
    counts = -(-np.diff(np.asarray(known)) // chunk_size)
    sequence = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([sequence, np.arange(len(sequence)) - first], axis=1).astype(cu_seqlens.dtype)


def sequence_of_token(cu_seqlens, token):
    """The sequence that each token belongs to; N at padding."""
    return jnp.searchsorted(cu_seqlens[1:], token, side="right")


def sequence_at(cu_seqlens, token):
    """The sequence that one token belongs to and the token where it starts; at padding, no sequence starts
    before it: (N - 1, the token)."""
    n = sequence_of_token(cu_seqlens, token)
    N = cu_seqlens.shape[0] - 1
    return jnp.minimum(n, N - 1), jnp.where(n < N, cu_seqlens[n], token)


def pad_tokens(x, C):
    """x [B, T, ...] with at least C tokens, so that a chunk can be sliced from it."""
    return jnp.pad(x, [(0, 0), (0, max(0, C - x.shape[1]))] + [(0, 0)] * (x.ndim - 2))


def cut(x, start, length, C):
    """The chunk [start, start + length) of x [B, T, ...], zero up to C rows: [B, C, ...].

    A length of None is C, known before the program runs: nothing is selected.
    """
    # A slice may not reach past the end of x: take the last C tokens there, and move them up.
    begin = start if length is None else jnp.minimum(start, x.shape[1] - C)
    rows = lax.dynamic_slice_in_dim(*hidden(x, begin), C, axis=1)
    if length is None:
        return rows
    rows = jnp.take(rows, jnp.arange(C) + (start - begin), axis=1, mode="clip")
    return keep_rows(rows, length)


def keep_rows(rows, length):
    """rows [B, C, ...] with those from `length` on selected away."""
    if length is None:
        return rows
    return jnp.where(_over_rows(jnp.arange(rows.shape[1]) < length, rows), rows, 0)


def put(x, rows, start, length):
    """x [B, T, ...] with its tokens [start, start + length) replaced by the first rows of [B, C, ...]."""
    C = rows.shape[1]
    rows = rows.astype(x.dtype)
    if length is None:
        return lax.dynamic_update_slice_in_dim(x, rows, start, axis=1)
    begin = jnp.minimum(start, x.shape[1] - C)
    index = jnp.arange(C) - (start - begin)
    inside = _over_rows((index >= 0) & (index < length), x)
    old = lax.dynamic_slice_in_dim(x, begin, C, axis=1)
    rows = jnp.where(inside, jnp.take(rows, index, axis=1, mode="clip"), old)
    return lax.dynamic_update_slice_in_dim(x, rows, begin, axis=1)


def _over_rows(mask, x):
    """A mask over C rows, shaped to select from x [B, C, ...]."""
    return mask.reshape(1, -1, *[1] * (x.ndim - 2))


def split_heads(x, HV):
    """Token layout [B, C, H, ...] to [B, HV, C, ...], a q/k head for every value head that reads it."""
    G = HV // x.shape[2]
    return jnp.swapaxes(x if G == 1 else jnp.repeat(x, G, axis=2), 1, 2)


def keep_tokens(x, cu_seqlens):
    """x [B, T, ...] with the padding behind the last sequence selected away."""
    if cu_seqlens is None:
        return x
    inside = jnp.arange(x.shape[1]) < cu_seqlens[-1]
    return jnp.where(_over_rows(inside, x), x, 0)


def sum_groups(x, H):
    """[B, T, HV, K] to [B, T, H, K], summed over the value heads that read a q/k head."""
    return x.reshape(*x.shape[:2], H, -1, x.shape[-1]).sum(axis=3)


def merge_heads(x):
    """[B, HV, C, ...] to token layout, [B, C, HV, ...]."""
    return jnp.swapaxes(x, 1, 2)


def first_states(initial_state, N, HV, K, V, state_v_first, dtype):
    """The state that each sequence starts from, [N, HV, K, V]; zeros for None."""
    if initial_state is None:
        return jnp.zeros((N, HV, K, V), dtype)
    return turn(initial_state, state_v_first).astype(dtype)


def read_state(states, n, packed):
    """What a chunk works on, [B, HV, K, V], of states [N, HV, K, V]: sequence n's, or every row's."""
    return sliced(states, n) if packed else states


def write_state(states, S, n, packed):
    """`read_state` undone."""
    return lax.dynamic_update_slice_in_dim(states, S, n, axis=0) if packed else S


def merge_states(h, state_v_first):
    """What enters the chunks, [NT, B, HV, K, V], in the layout of the caller: [B, NT, HV, ...]."""
    return turn(jnp.swapaxes(h, 0, 1), state_v_first)


def turn(states, state_v_first):
    """States [..., K, V] to the layout of the caller, or from it: [..., V, K] with `state_v_first`."""
    return jnp.swapaxes(states, -1, -2) if state_v_first else states


class Split:
    """All chunks at once, for a stage on its own: [B, T, HV, ...] to [NT, B, HV, C, ...] and back."""

    def __init__(self, cu_seqlens, NT, T, C, HV, dtype):
        self.T, self.C, self.HV, self.dtype = T, C, HV, dtype
        self.cu_seqlens = jnp.array([0, T]) if cu_seqlens is None else jnp.asarray(cu_seqlens)
        self.table = chunk_table(self.cu_seqlens, NT, C)

    def split(self, x):
        """Rows past a chunk's end are zero."""
        rows = jax.vmap(cut, (None, 0, 0, None))(pad_tokens(x, self.C), *self.table[1:], self.C)
        return jax.vmap(split_heads, (0, None))(rows, self.HV).astype(self.dtype)

    def split_cumsum(self, x):
        """Rows past a chunk's end repeat its last: a cumulative sum goes on there without decay."""
        x = self.split(x)
        row = jnp.minimum(jnp.arange(self.C), self.table.length[:, None] - 1)  # [NT, C]
        return jax.vmap(partial(jnp.take, axis=2, mode="clip"))(x, row)

    def split_states(self, h, state_v_first):
        """States [B, NT, HV, K, V] in the layout of the caller, as [NT, B, HV, K, V]."""
        return jnp.swapaxes(turn(h, state_v_first), 0, 1).astype(self.dtype)

    def keep(self, x):
        """x [NT, B, HV, C, K] with the rows past each chunk's end selected away."""
        is_token = jnp.arange(self.C) < self.table.length[:, None]  # [NT, C]
        return jnp.where(is_token[:, None, None, :, None], x, 0)

    def merge(self, x, dtype):
        """In `dtype`, or as it is for None; padding is zero."""
        token = jnp.arange(self.T)
        sequence = sequence_of_token(self.cu_seqlens, token)
        offset = token - self.cu_seqlens[sequence]
        chunk = prepare_chunk_offsets(self.cu_seqlens, self.C)[sequence] + offset // self.C
        rows = jax.vmap(merge_heads)(x)[chunk, :, offset % self.C]  # [T, B, HV, ...]
        inside = token < self.cu_seqlens[-1]
        rows = jnp.where(inside.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
        return jnp.moveaxis(rows, 0, 1).astype(dtype or x.dtype)
