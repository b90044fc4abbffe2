"""Stages 1 and 2 on their own."""

from functools import partial

import jax
import jax.numpy as jnp

from . import checks, chunking, one_chunk
from .one_chunk.decay import of_tokens
from .one_chunk.intra import intra
from .rounding import storage


def chunk_kda_fwd_intra(
    q,
    k,
    v,
    gk,
    beta,
    scale=None,
    cu_seqlens=None,
    chunk_size=64,
    chunk_indices=None,
    safe_gate=False,
    lower_bound=None,
    disable_recompute=False,
    *,
    use_exp2=True,
    storage_dtype=None,
):
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
        cu_seqlens, chunk_indices: as for `chunk_kda_fwd`.
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
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("gk", gk, "B T HV K", sizes)
    checks.tensor("beta", beta, "B T HV", sizes)
    checks.sequences(cu_seqlens, sizes)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    checks.safe_gate(safe_gate, lower_bound)
    scale = checks.number_or("scale", scale, sizes["K"] ** -0.5)
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
    a = of_tokens(chunks.split_cumsum(gk), use_exp2)
    q, k, v, beta = (chunks.split(x) for x in (q, k, v, beta))
    made = one_chunk.matrices(intra(q, k, a), v, beta, scale, store)
    return tuple(chunks.merge(made[x], storage_dtype) for x in ("w", "u", "qg", "kg", "Aqk", "Akk"))
