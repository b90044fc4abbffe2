"""Stage 4 on its own: the output."""

from functools import partial

import jax
import jax.numpy as jnp

from . import checks, chunking
from .one_chunk.decay import from_cumsum
from .one_chunk.output import output
from .one_chunk.xla import matmul
from .rounding import storage
from .types import Array, DType, Scalar, Sequences


def chunk_gla_fwd_o_gk(
    q: Array,
    v: Array,
    g: Array,
    A: Array,
    h: Array,
    scale: Scalar | None,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    chunk_indices: Array | None = None,
    use_graph: bool = False,
    *,
    use_exp2: bool = True,
    storage_dtype: DType | None = None,
    output_dtype: DType | None = None,
    transpose_state_layout: bool | None = None,
) -> jax.Array:
    """Stage 4 on its own, in token layout.

        o = scale * (q * D(i<-0)) h + A v

    Args:
        q: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V], the v_new of `chunk_gated_delta_rule_fwd_h`.
        g: [B, T, HV, K], chunk-local cumulative sum of the log decays; log2 with `use_exp2`, else nats.
        A: [B, T, HV, C], the scaled Aqk of `chunk_kda_fwd_intra`; what lies above the diagonal is not read.
        h: [B, NT, HV, K, V], the state that enters each chunk.
        scale: a number; None is K ** -0.5.
        state_v_first: h is [B, NT, HV, V, K]. `transpose_state_layout` is its deprecated name.
        chunk_size: C, one of 16, 32, 64, 128.
        cu_seqlens, chunk_indices, use_graph: as for `chunk_kda_fwd`.
        use_exp2: the unit of g, log2 (as `chunk_kda_fwd` returns g) or nats.
        storage_dtype: round the operands of the products to it; None keeps them.
        output_dtype: the dtype of o; None is v's.

    Returns:
        o [B, T, HV, V] in `output_dtype`, zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.gla.chunk.chunk_gla_fwd_o_gk`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(use_exp2=use_exp2)
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("g", g, "B T HV K", sizes)
    checks.sequences(cu_seqlens, sizes)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    sizes["C"] = chunk_size
    checks.tensor("A", A, "B T HV C", sizes)
    sizes["NT"] = chunking.exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, chunk_size)
    checks.tensor("h", h, "B NT HV V K" if state_v_first else "B NT HV K V", sizes)
    scale = checks.scale_or(scale, sizes["K"] ** -0.5)
    storage_dtype = checks.storage(storage_dtype)
    return _chunk_gla_fwd_o_gk(
        *(q, v, g, A, chunking.turn(h, state_v_first), cu_seqlens),
        **dict(scale=scale, use_exp2=use_exp2, storage_dtype=storage_dtype),
        output_dtype=checks.storage(output_dtype, "output_dtype") or v.dtype,
    )


@partial(jax.jit, static_argnames=("scale", "use_exp2", "storage_dtype", "output_dtype"))
def _chunk_gla_fwd_o_gk(q, v, g, A, h, cu_seqlens, *, scale, use_exp2, storage_dtype, output_dtype):
    (T, HV), C, NT = v.shape[1:3], A.shape[-1], h.shape[1]
    dtype = jnp.result_type(jnp.float32, q, v, g, A, h)
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    prefix, _, _ = from_cumsum(chunks.split_cumsum(g), use_exp2)
    S = jnp.swapaxes(h, 0, 1).astype(dtype)  # [NT, B, HV, K, V]
    Aqk = jnp.where(jnp.tril(jnp.ones((C, C), bool)), chunks.split(A), 0)
    qg_S = matmul(store(chunks.split(q) * prefix), store(S))
    o = output(scale * qg_S, Aqk, chunks.split(v))
    return chunks.merge(o, output_dtype)
