"""The chunked backward, and its stages 4 and 2 on their own."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import checks, chunking, contracts
from .activations import RCP_LN2
from .chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
from .chunk_intra import intra_bwd
from .gate import kda_gate_bwd, kda_gate_chunk_cumsum
from .one_chunk.decay import ends_backward, from_cumsum, of_tokens_backward
from .one_chunk.output import d_scores, output_backward
from .one_chunk.wy import w_u_backward
from .one_chunk.xla import matmul_nt
from .rounding import storage, stored_sum
from .types import Array, DType, Scalar, Sequences
from .wy_fast import recompute_w_u_fwd


class ChunkKDABackward(NamedTuple):
    """The gradients of FLA's chunked backward, in FLA's order; None for what was not given."""

    dq: jax.Array  # [B, T, H, K]
    dk: jax.Array  # [B, T, H, K]
    dv: jax.Array  # [B, T, HV, V]
    db: jax.Array  # [B, T, HV]
    dg: jax.Array  # [B, T, HV, K]  of the log decays in nats, or of the raw gates
    dh0: jax.Array | None  # [N, HV, K, V]
    dA: jax.Array | None  # of A_log, in its shape
    dbias: jax.Array | None  # of dt_bias, in its shape


def chunk_kda_bwd(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    Aqk: Array,
    Akk: Array,
    scale: Scalar | None,
    initial_state: Array | None,
    do: Array,
    dht: Array | None,
    g: Array | None = None,
    g_org: Array | None = None,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    chunk_indices: Array | None = None,
    chunk_size: int = 64,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    disable_recompute: bool = False,
    cp_context: None = None,
    use_graph: bool = False,
    chunk_offsets: Array | None = None,
    *,
    w: Array | None = None,
    u: Array | None = None,
    qg: Array | None = None,
    kg: Array | None = None,
    v_new: Array | None = None,
    h: Array | None = None,
    storage_dtype: DType | None = None,
) -> ChunkKDABackward:
    """The gradients of `chunk_kda_fwd`, from what it returned, by FLA's stages.

        dAqk = scale tril(do v_new^T)    dv = Aqk^T do            chunk_kda_bwd_dAv               stage 4
        dh, dh0, dv += kg dh                                      chunk_gated_delta_rule_bwd_dhu  stage 3
        dq, dk, dv, db, dg through qg, kg, w, u and decay; dAkk   chunk_kda_bwd_wy_dqkg_fused     stage 2
        dq, dk, db, dg += those through the scores                chunk_kda_bwd_intra             stage 1

    where dAqk is the cotangent of Aqk / scale, and dAkk that of L, with Akk = (I + L)^-1. The last two stages
    return dg of the cumulative sums, as ops of their own; its sum back over a chunk is dg of the log decays.
    Here the latter is handed on, which does not cancel. Of raw gates `kda_gate_bwd` makes the rest.

    All decays are read from g, which is rounded. `jax.vjp` of `chunk_kda` makes the same gradients from the
    log decays themselves.

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        beta: [B, T, HV].
        Aqk, Akk: [B, T, HV, C], the forward's.
        scale: a number; None is K ** -0.5.
        initial_state: [N, HV, K, V], or None for zeros.
        do: [B, T, HV, V], the cotangent of o.
        dht: [N, HV, K, V], the cotangent of the final state, or None for zeros.
        g: [B, T, HV, K], the forward's: chunk-local cumulative sum of the log decays, log2, finite. May be
            None with `use_gate_in_kernel` and without `disable_recompute`.
        g_org: [B, T, HV, K], the raw gates, with `use_gate_in_kernel`; their log decays are finite.
        state_v_first: states are [..., V, K].
        cu_seqlens, chunk_indices, chunk_size: as for `chunk_kda_fwd`.
        safe_gate: accepted for FLA's sake and held to its rules, as for `chunk_kda_fwd`.
        lower_bound, use_gate_in_kernel, A_log, dt_bias: as for `chunk_kda_fwd`.
        cp_context, use_graph, chunk_offsets: as for `chunk_kda_fwd`.
        disable_recompute: read w, qg, kg, v_new and h instead of making them again.
        w, qg, kg, v_new, h: the forward's, with `disable_recompute`; not read without. u never is. Under
            `jit` h has as many chunks as `chunk_indices` lists, or else (T + N * (C - 1)) // C.
        storage_dtype: round to it what FLA's kernels store in k's dtype, and the operands that they round
            before a product; None keeps the arithmetic's dtype.

    Returns:
        `ChunkKDABackward`. dq, dk, db, dh0, and dg of log decays have the arithmetic's dtype, the widest of
        q, k, v, beta, do and the saved tensors, float32 or wider; dv has `storage_dtype`, or else that; dg of
        raw gates, dA and dbias have the dtype of what they are the gradients of. Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk_bwd.chunk_kda_bwd`.
    """
    checks.flags(disable_recompute=disable_recompute, state_v_first=state_v_first)
    saved = dict(w=w, qg=qg, kg=kg, v_new=v_new, h=h)
    checks.no_context(cp_context)
    cu_seqlens, chunk_size, NT = contracts.backward(
        *(q, k, v, beta, Aqk, Akk, initial_state, do, dht, g, g_org, state_v_first, use_gate_in_kernel),
        *(chunk_size, cu_seqlens, chunk_indices, chunk_offsets, use_graph),
        saved if disable_recompute else {},
    )
    raw = g_org if use_gate_in_kernel else g
    contracts.gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate, raw)
    scale = checks.scale_or(scale, q.shape[-1] ** -0.5)
    storage_dtype = checks.storage(storage_dtype)
    chunks = dict(chunk_size=chunk_size, cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
    stages = chunks | dict(storage_dtype=storage_dtype)
    states = stages | dict(state_v_first=state_v_first)
    gate = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)

    if not disable_recompute:
        if use_gate_in_kernel:
            dtype = jnp.promote_types(g_org.dtype, jnp.float32)
            g = kda_gate_chunk_cumsum(g_org, scale=RCP_LN2, output_dtype=dtype, **gate, **chunks)
        packing = dict(cu_seqlens=cu_seqlens, chunk_indices=chunk_indices)
        w, u, qg, kg = recompute_w_u_fwd(k, v, beta, Akk, gk=g, q=q, **packing, storage_dtype=storage_dtype)
        h, v_new, _ = chunk_gated_delta_rule_fwd_h(kg, w, u, gk=g, initial_state=initial_state, **states)
    dAqk, dv = chunk_kda_bwd_dAv(q, k, v_new, do, Aqk, scale, **stages)
    dh, dh0, dv = chunk_gated_delta_rule_bwd_dhu(
        qg, kg, w, do, dv, gk=g, h0=initial_state, dht=dht, scale=scale, **states
    )
    # FLA hands on the cotangent of the sums and sums it in the end. That of the log decays does not cancel.
    dq, dk, dv, db, dg, dAkk = wy_dqkg_bwd(
        *(q, k, v, v_new, g, beta, Akk, h, do, dh, dv, cu_seqlens),
        **dict(NT=NT, scale=scale, state_v_first=state_v_first, storage_dtype=storage_dtype),
        dg_of_sums=False,
    )
    dq, dk, db, dg = intra_bwd(q, k, g, beta, dAqk, dAkk, dq, dk, db, dg, cu_seqlens, NT=NT, dg_of_sums=False)
    dq, dk = (chunking.sum_groups(x, q.shape[2]) for x in (dq, dk))
    dA, dbias = None, None
    if use_gate_in_kernel:
        dg, dA, dbias = kda_gate_bwd(chunking.keep_tokens(g_org, cu_seqlens), dyg=dg, **gate)
    return ChunkKDABackward(dq, dk, dv, db, dg, dh0, dA, dbias)


def chunk_kda_bwd_dAv(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    A: Array,
    scale: Scalar | None = None,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    chunk_indices: Array | None = None,
    use_graph: bool = False,
    *,
    storage_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Stage 4 backwards, on its own: what the scores inside a chunk and v_new get from o.

        dA = scale tril(do v^T)      dv = A^T do

    Args:
        q, k: [B, T, H, K], for their shapes; float64, float32, bfloat16 or float16, as everything here.
        v: [B, T, HV, V], the v_new of the forward.
        do: [B, T, HV, V], the cotangent of o.
        A: [B, T, HV, C], the forward's Aqk, with scale; what lies above the diagonal is not read.
        scale: a number; None is K ** -0.5.
        cu_seqlens, chunk_size, chunk_indices, use_graph: as for `chunk_kda_fwd`.
        storage_dtype: round dv to it; None keeps it.

    Returns:
        dA [B, T, HV, C] in the arithmetic's dtype, the widest of v, do and A, float32 or wider: the
        cotangent of Aqk / scale. dv [B, T, HV, V] in `storage_dtype`, or else in that. Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.chunk_bwd.chunk_kda_bwd_dAv`.
    """
    sizes = {}
    checks.tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"), do=(do, "B T HV V"))
    checks.grouped("v", sizes)
    packing = cu_seqlens, chunk_indices, use_graph
    cu_seqlens, _, NT = contracts.stage(sizes, chunk_size, *packing)
    checks.tensor("A", A, "B T HV C", sizes)
    scale = checks.scale_or(scale, sizes["K"] ** -0.5)
    storage_dtype = checks.storage(storage_dtype)
    return _chunk_kda_bwd_dAv(v, do, A, cu_seqlens, NT=NT, scale=scale, storage_dtype=storage_dtype)


@partial(jax.jit, static_argnames=("NT", "scale", "storage_dtype"))
def _chunk_kda_bwd_dAv(v_new, d_o, A, cu_seqlens, *, NT, scale, storage_dtype):
    (T, HV), C = A.shape[1:3], A.shape[-1]
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, jnp.result_type(jnp.float32, v_new, d_o, A))
    v_new, d_o, Aqk = chunks.split(v_new), chunks.split(d_o), jnp.tril(chunks.split(A))
    d_Aqk = scale * d_scores(v_new, d_o)
    return chunks.merge(d_Aqk, None), chunks.merge(output_backward(Aqk, d_o), storage_dtype)


def chunk_kda_bwd_wy_dqkg_fused(
    q: Array,
    k: Array,
    v: Array,
    v_new: Array,
    g: Array,
    beta: Array,
    A: Array,
    h: Array,
    do: Array,
    dh: Array,
    dv: Array,
    scale: Scalar | None = None,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    chunk_indices: Array | None = None,
    chunk_offsets: Array | None = None,
    use_graph: bool = False,
    *,
    storage_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Stage 2 backwards, on its own: what comes through qg, kg, w, u and the decay of the state.

    With du the argument dv, the cotangent of v_new and so of u, and k_in = k D(i<-0):

        dqg = scale do h^T      dkg = v_new dh^T      dw = -du h^T
        dk_in = beta A^T dw     dv  = beta A^T du     db = A^T dw . k_in + A^T du . v
        dq = dqg D(i<-0)        dk  = dkg D(C<-j) + dk_in D(i<-0)
        dg = qg dqg + k_in dk_in - kg dkg, and in a chunk's last row + sum_j kg dkg + D(C<-0) sum_v h dh
        dA = -tril(A^T tril(dw (beta k_in)^T + du (beta v)^T, -1) A^T, -1)

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, as everything here.
        v, v_new: [B, T, HV, V].
        g: [B, T, HV, K], chunk-local cumulative sum of the log decays, log2, finite.
        beta: [B, T, HV].
        A: [B, T, HV, C], the forward's Akk, zero above the diagonal.
        h: [B, NT, HV, K, V], the state that enters each chunk.
        do: [B, T, HV, V], the cotangent of o.
        dh: [B, NT, HV, K, V], the cotangent of the state that leaves each chunk.
        dv: [B, T, HV, V], the cotangent of v_new. Like dh it is of `chunk_gated_delta_rule_bwd_dhu`.
        scale: a number; None is K ** -0.5.
        state_v_first: h and dh are [B, NT, HV, V, K].
        cu_seqlens, chunk_size, chunk_indices, chunk_offsets, use_graph: as for `chunk_kda_fwd`.
        storage_dtype: round dv and the operands of the products to it; None keeps them.

    Returns:
        dq, dk [B, T, HV, K], a q/k head for every value head, dv [B, T, HV, V], db [B, T, HV],
        dg [B, T, HV, K], the cotangent of the cumulative sums in nats, and dA [B, T, HV, C], that of L, with
        Akk = (I + L)^-1. dv in `storage_dtype`; all others in the arithmetic's dtype, the widest of the
        arguments, float32 or wider. Zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.chunk_bwd.chunk_kda_bwd_wy_dqkg_fused`.
    """
    checks.flags(state_v_first=state_v_first)
    sizes = {}
    checks.tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    checks.grouped("v", sizes)
    packing = cu_seqlens, chunk_indices, use_graph, chunk_offsets
    cu_seqlens, _, NT = contracts.stage(sizes, chunk_size, *packing)
    states = "B NT HV V K" if state_v_first else "B NT HV K V"
    checks.tensors(
        sizes,
        v_new=(v_new, "B T HV V"),
        g=(g, "B T HV K"),
        beta=(beta, "B T HV"),
        A=(A, "B T HV C"),
        h=(h, states),
        do=(do, "B T HV V"),
        dh=(dh, states),
        dv=(dv, "B T HV V"),
    )
    scale = checks.scale_or(scale, sizes["K"] ** -0.5)
    return wy_dqkg_bwd(
        *(q, k, v, v_new, g, beta, A, h, do, dh, dv, cu_seqlens),
        **dict(NT=NT, scale=scale, state_v_first=state_v_first, storage_dtype=checks.storage(storage_dtype)),
        dg_of_sums=True,
    )


@partial(jax.jit, static_argnames=("NT", "scale", "state_v_first", "storage_dtype", "dg_of_sums"))
def wy_dqkg_bwd(
    q, k, v, v_new, g, beta, A, h, d_o, dh, dv, cu_seqlens,
    *, NT, scale, state_v_first, storage_dtype, dg_of_sums,
):  # fmt: skip
    """`chunk_kda_bwd_wy_dqkg_fused` after the checks; without `dg_of_sums`, dg is of the log decays."""
    (T, HV), C = A.shape[1:3], A.shape[-1]
    dtype = jnp.result_type(jnp.float32, q, k, v, v_new, g, beta, A, h, d_o, dh, dv)
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    D_in, D_out, decay = from_cumsum(chunks.split_cumsum(g), use_exp2=True)
    S, d_S_out = (store(chunks.split_states(x, state_v_first)) for x in (h, dh))
    q, k, v, v_new, beta, Akk, d_o, d_u = (chunks.split(x) for x in (q, k, v, v_new, beta, A, d_o, dv))
    qg, k_in, kg = q * D_in, k * D_in, k * D_out

    d_qg, d_kg, d_w = scale * matmul_nt(d_o, S), matmul_nt(v_new, d_S_out), -matmul_nt(store(d_u), S)
    d_L, d_k_in, d_v, d_beta = w_u_backward(Akk, k_in, v, beta, store(d_w), d_u, store)
    d_g = ends_backward(qg * d_qg + k_in * d_k_in, kg * d_kg, decay * stored_sum(S * d_S_out, storage_dtype))
    d_g = chunks.keep(d_g)
    d_g = of_tokens_backward(d_g) if dg_of_sums else d_g
    d_k = d_kg * D_out + d_k_in * D_in
    made = dict(dq=d_qg * D_in, dk=d_k, dv=d_v, db=d_beta, dg=d_g, dA=d_L)
    return tuple(chunks.merge(x, storage_dtype if name == "dv" else None) for name, x in made.items())
