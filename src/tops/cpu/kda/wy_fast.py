"""Stage 2 on its own: the WY representation, w and u."""

from functools import partial

import jax
import jax.numpy as jnp

from . import checks, chunking
from .one_chunk.decay import from_cumsum
from .one_chunk.wy import w_u
from .rounding import beta_k_storage, storage
from .types import Array, DType, Sequences


def recompute_w_u_fwd(
    k: Array,
    v: Array,
    beta: Array,
    A: Array,
    *,
    gk: Array,
    q: Array | None = None,
    cu_seqlens: Sequences | None = None,
    chunk_indices: Array | None = None,
    use_graph: bool = False,
    use_exp2: bool = True,
    storage_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Stage 2 on its own, in token layout. By keyword from gk on: FLA's releases differ in which of q and gk
    comes first.

        w = A (beta * k * D(i<-0))      u = A (beta * v)
        qg = q * D(i<-0)                kg = k * D(C<-j)

    Args:
        k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        beta: [B, T, HV].
        A: [B, T, HV, C], the inverse Akk of `chunk_kda_fwd_intra`.
        gk: [B, T, HV, K], chunk-local cumulative sum of the log decays, finite; in `use_exp2`'s unit.
        q: [B, T, H, K], or None: then qg is None.
        cu_seqlens, chunk_indices, use_graph: as for `chunk_kda_fwd`.
        use_exp2: the unit of gk, log2 (as `chunk_kda_fwd` returns g) or nats.
        storage_dtype: round w, u, qg, kg and the operands of the products to it; None keeps them.

    Returns:
        w [B, T, HV, K], u [B, T, HV, V], qg [B, T, HV, K] or None, kg [B, T, HV, K]; in `storage_dtype`, or
        else in the widest dtype of the arguments, float32 or wider. Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.wy_fast.recompute_w_u_fwd`.
    """
    checks.flags(use_exp2=use_exp2)
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    sizes = {}
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.tensor("beta", beta, "B T HV", sizes)
    checks.tensor("A", A, "B T HV C", sizes)
    checks.tensor("gk", gk, "B T HV K", sizes)
    if q is not None:
        checks.tensor("q", q, "B T H K", sizes)
    checks.grouped("v", sizes)
    checks.sequences(cu_seqlens, sizes)
    checks.chunk_columns("A", A)
    checks.chunks(sizes["C"], cu_seqlens, chunk_indices, sizes["T"])
    storage_dtype = checks.storage(storage_dtype)
    NT = chunking.exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, sizes["C"])
    return _recompute_w_u_fwd(
        k, v, beta, A, gk, q, cu_seqlens, NT=NT, use_exp2=use_exp2, storage_dtype=storage_dtype
    )


@partial(jax.jit, static_argnames=("NT", "use_exp2", "storage_dtype"))
def _recompute_w_u_fwd(k, v, beta, A, gk, q, cu_seqlens, *, NT, use_exp2, storage_dtype):
    (T, HV), C = v.shape[1:3], A.shape[-1]
    dtype = jnp.result_type(jnp.float32, k, v, beta, A, gk, *([] if q is None else [q]))
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    prefix, suffix, _ = from_cumsum(chunks.split_cumsum(gk), use_exp2)
    store_beta_k = beta_k_storage(storage_dtype, beta.dtype)
    k, beta = chunks.split(k), chunks.split(beta)
    beta_k_in = store_beta_k(beta[..., None] * k) * prefix
    w, u = w_u(chunks.split(A), beta_k_in, chunks.split(v), beta, storage(storage_dtype))
    qg = None if q is None else chunks.split(q) * prefix
    return tuple(None if x is None else chunks.merge(x, storage_dtype) for x in (w, u, qg, k * suffix))
