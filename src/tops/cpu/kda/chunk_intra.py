"""Stages 1 and 2 on their own, and stage 1 backwards."""

from functools import partial

import jax
import jax.numpy as jnp

from . import checks, chunking, contracts, one_chunk
from .one_chunk.decay import from_cumsum, of_tokens, of_tokens_backward
from .one_chunk.intra import intra, scores_backward
from .rounding import beta_k_storage, storage
from .types import Array, DType, Scalar, Sequences


def chunk_kda_fwd_intra(
    q: Array,
    k: Array,
    v: Array,
    gk: Array,
    beta: Array,
    scale: Scalar | None = None,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    chunk_indices: Array | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    use_graph: bool = False,
    *,
    use_exp2: bool = True,
    storage_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array, jax.Array]:
    """Stages 1 and 2 on their own, in token layout, as FLA's function of this name does both.

        Aqk[i,j] = scale * sum_d q_i k_j D(i<-j)     j <= i
        Akk      = (I + L)^-1,  L[i,j] = beta_i * sum_d k_i k_j D(i<-j), j < i
        w = Akk (beta * k * D(i<-0))      u = Akk (beta * v)
        qg = q * D(i<-0)                  kg = k * D(C<-j)

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        gk: [B, T, HV, K], chunk-local cumulative sum of the log decays, finite; in `use_exp2`'s unit.
        beta: [B, T, HV].
        scale: a number; None is K ** -0.5.
        chunk_size: C, one of 16, 32, 64, 128.
        cu_seqlens, chunk_indices, use_graph: as for `chunk_kda_fwd`.
        safe_gate, lower_bound: accepted for FLA's sake; the products of decays are safe for all gates.
        disable_recompute: return qg too.
        use_exp2: the unit of gk, log2 (as `chunk_kda_fwd` returns g) or nats.
        storage_dtype: round what is returned, and the operands of the products, to it; None keeps them.

    Returns:
        w [B, T, HV, K], u [B, T, HV, V], qg [B, T, HV, K] or None, kg [B, T, HV, K], Aqk and Akk
        [B, T, HV, C]; in `storage_dtype`, or else in the widest dtype of the arguments, float32 or wider.
        Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk_intra.chunk_kda_fwd_intra`.
    """
    checks.flags(disable_recompute=disable_recompute, use_exp2=use_exp2)
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("gk", gk, "B T HV K", sizes)
    checks.tensor("beta", beta, "B T HV", sizes)
    checks.sequences(cu_seqlens, sizes)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    contracts.safe_gate(safe_gate, lower_bound)
    scale = checks.scale_or(scale, sizes["K"] ** -0.5)
    storage_dtype = checks.storage(storage_dtype)
    NT = chunking.exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, chunk_size)
    w, u, qg, kg, Aqk, Akk = _chunk_kda_fwd_intra(
        *(q, k, v, gk, beta, cu_seqlens),
        **dict(NT=NT, C=chunk_size, scale=scale, use_exp2=use_exp2, storage_dtype=storage_dtype),
    )
    return w, u, qg if disable_recompute else None, kg, Aqk, Akk


@partial(jax.jit, static_argnames=("NT", "C", "scale", "use_exp2", "storage_dtype"))
def _chunk_kda_fwd_intra(q, k, v, gk, beta, cu_seqlens, *, NT, C, scale, use_exp2, storage_dtype):
    T, HV = v.shape[1:3]
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, jnp.result_type(jnp.float32, q, k, v, gk, beta))
    store_beta_k = beta_k_storage(storage_dtype, beta.dtype)
    gk = chunks.split_cumsum(gk)
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta))
    beta_k_in = store_beta_k(beta[..., None] * k) * from_cumsum(gk, use_exp2)[0]
    made = one_chunk.matrices(intra(q, k, of_tokens(gk, use_exp2)), v, beta, scale, store, beta_k_in)
    return tuple(chunks.merge(made[x], storage_dtype) for x in ("w", "u", "qg", "kg", "Aqk", "Akk"))


def chunk_kda_bwd_intra(
    q: Array,
    k: Array,
    g: Array,
    beta: Array,
    dAqk: Array,
    dAkk: Array,
    dq: Array,
    dk: Array,
    db: Array,
    dg: Array,
    cu_seqlens: Sequences | None = None,
    chunk_indices: Array | None = None,
    chunk_size: int = 64,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    use_graph: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Stage 1 backwards, on its own: the gradients that come through the scores inside a chunk.

        dq_i += sum_j dAqk[i,j] k_j D(i<-j)                                               j <= i
        dk_i += beta_i sum_j dAkk[i,j] k_j D(i<-j)                                        j < i
        dk_j += sum_i dAqk[i,j] q_i D(i<-j)                                               i >= j
        dk_j += sum_i dAkk[i,j] beta_i k_i D(i<-j)                                        i > j
        db_i += sum_j dAkk[i,j] sum_d k_i k_j D(i<-j)                                     j < i

    and dg, of the cumulative sums, likewise.

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        g: [B, T, HV, K], chunk-local cumulative sum of the log decays, log2, finite.
        beta: [B, T, HV].
        dAqk: [B, T, HV, C], the cotangent of Aqk / scale, of `chunk_kda_bwd_dAv`.
        dAkk: [B, T, HV, C], that of L, with Akk = (I + L)^-1, of `chunk_kda_bwd_wy_dqkg_fused`. Of both
            nothing above the diagonal is read, of dAkk not the diagonal either.
        dq, dk: [B, T, HV, K], a q/k head for every value head, what is added to.
        db: [B, T, HV], likewise.
        dg: [B, T, HV, K], likewise, the cotangent of the cumulative sums in nats.
        cu_seqlens, chunk_indices, chunk_size, use_graph: as for `chunk_kda_fwd`.
        safe_gate, lower_bound: accepted for FLA's sake and held to its rules; every gate is safe here.

    Returns:
        dq, dk, db and dg, as they came plus what comes through the scores, in the arithmetic's dtype, the
        widest of the arguments, float32 or wider. Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.chunk_intra.chunk_kda_bwd_intra`.
    """
    sizes = {}
    checks.tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), g=(g, "B T HV K"), beta=(beta, "B T HV"))
    checks.grouped("g", sizes)
    packing = cu_seqlens, chunk_indices, use_graph
    cu_seqlens, _, NT = contracts.stage(sizes, chunk_size, *packing)
    checks.tensors(sizes, dAqk=(dAqk, "B T HV C"), dAkk=(dAkk, "B T HV C"))
    checks.tensors(sizes, dq=(dq, "B T HV K"), dk=(dk, "B T HV K"), db=(db, "B T HV"), dg=(dg, "B T HV K"))
    contracts.safe_gate(safe_gate, lower_bound)
    return intra_bwd(q, k, g, beta, dAqk, dAkk, dq, dk, db, dg, cu_seqlens, NT=NT, dg_of_sums=True)


@partial(jax.jit, static_argnames=("NT", "dg_of_sums"))
def intra_bwd(q, k, g, beta, dAqk, dAkk, dq, dk, db, dg, cu_seqlens, *, NT, dg_of_sums):
    """`chunk_kda_bwd_intra` after the checks; without `dg_of_sums`, dg is of the log decays themselves."""
    (T, HV), C = g.shape[1:3], dAqk.shape[-1]
    dtype = jnp.result_type(jnp.float32, q, k, g, beta, dAqk, dAkk, dq, dk, db, dg)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    a = of_tokens(chunks.split_cumsum(g), use_exp2=True)
    q, k, beta, dAqk, dAkk = (chunks.split(x) for x in (q, k, beta, dAqk, dAkk))
    d_q, d_k, d_beta, d_g = scores_backward(q, k, a, beta, dAqk, dAkk)
    d_g = of_tokens_backward(d_g) if dg_of_sums else d_g
    made = zip((dq, dk, db, dg), (d_q, d_k, d_beta, d_g), strict=True)
    return tuple(chunks.merge(chunks.split(x) + y, None) for x, y in made)
