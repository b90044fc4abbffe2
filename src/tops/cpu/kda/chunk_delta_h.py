"""Stage 3 on its own, forward and backward: the state from chunk to chunk."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, chunking, contracts
from .one_chunk.decay import from_cumsum
from .one_chunk.state import next_state, u_less_w_S, u_less_w_S_backward
from .one_chunk.xla import matmul, matmul_tn
from .rounding import storage
from .types import Array, DType, Scalar, Sequences


def chunk_gated_delta_rule_fwd_h(
    k: Array,
    w: Array,
    u: Array,
    g: Array | None = None,
    gk: Array | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    save_new_value: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    cu_seqlens_cpu: Sequences | None = None,
    chunk_indices: Array | None = None,
    chunk_offsets: Array | None = None,
    *,
    use_exp2: bool = True,
    storage_dtype: DType | None = None,
    transpose_state_layout: bool | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Stage 3 on its own, in token layout: the state that enters each chunk.

        v_new = u - w S      S <- D(C<-0) S + (k * d)^T v_new

    with D(C<-0) from the last row of g and gk, and d = exp2(g_C - g_j) of the scalar gate alone: KDA passes
    k = kg, which holds its decay D(C<-j) already, and gk. With g alone this is Gated DeltaNet's state pass.

    Args:
        k: [B, T, Hk, K], float64, float32, bfloat16 or float16, as everything here; Hk divides HV.
        w: [B, T, HV, K].
        u: [B, T, HV, V].
        g: [B, T, HV] or None, chunk-local cumulative sum of a scalar log decay, finite.
        gk: [B, T, HV, K] or None, the same per key channel.
        initial_state: [N, HV, K, V], or None for zeros.
        output_final_state: whether to return the final state.
        chunk_size: C, one of 16, 32, 64, 128.
        save_new_value: whether to return v_new.
        state_v_first: states are [..., V, K]. `transpose_state_layout` is its deprecated name.
        cu_seqlens, cu_seqlens_cpu, chunk_indices, chunk_offsets: as for `chunk_kda_fwd`.
        use_exp2: the unit of g and gk, log2 (as `chunk_kda_fwd` returns g) or nats.
        storage_dtype: round h, v_new and the operands of the products to it; None keeps them.

    Returns:
        h [B, NT, HV, K, V] and v_new [B, T, HV, V] or None, in `storage_dtype`, or else in the arithmetic's
        dtype, the widest of the arguments, float32 or wider; the final state [N, HV, K, V] or None, in that
        dtype always.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_fwd_h`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(output_final_state=output_final_state, save_new_value=save_new_value, use_exp2=use_exp2)
    cu_seqlens = checks.listed(cu_seqlens)
    sizes = {}
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("w", w, "B T HV K", sizes)
    checks.tensor("u", u, "B T HV V", sizes)
    checks.grouped("w", sizes)
    if g is not None:
        checks.tensor("g", g, "B T HV", sizes)
    if gk is not None:
        checks.tensor("gk", gk, "B T HV K", sizes)
    checks.sequences(cu_seqlens, sizes)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    checks.chunk_offsets(chunk_offsets, cu_seqlens, chunk_size)
    checks.states(initial_state, state_v_first, sizes)
    storage_dtype = checks.storage(storage_dtype)
    known = checks.known_sequences(cu_seqlens, cu_seqlens_cpu)
    NT = chunking.exact_num_chunks(sizes["T"], known, chunk_indices, chunk_size)
    h, v_new, final_state = _chunk_gated_delta_rule_fwd_h(
        *(k, w, u, g, gk, initial_state, cu_seqlens),
        **dict(NT=NT, C=chunk_size, state_v_first=state_v_first, use_exp2=use_exp2),
        storage_dtype=storage_dtype,
    )
    return h, v_new if save_new_value else None, final_state if output_final_state else None


@partial(jax.jit, static_argnames=("NT", "C", "state_v_first", "use_exp2", "storage_dtype"))
def _chunk_gated_delta_rule_fwd_h(
    k, w, u, g, gk, initial_state, cu_seqlens, *, NT, C, state_v_first, use_exp2, storage_dtype
):
    T, _, K = k.shape[1:]
    HV, V = u.shape[2:]
    given = [x for x in (k, w, u, g, gk, initial_state) if x is not None]
    dtype = jnp.result_type(jnp.float32, *given)
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    k, w, u = chunks.split(k), chunks.split(w), chunks.split(u)
    decay = jnp.ones((*w.shape[:-2], K), dtype)
    if g is not None:
        _, suffix, total = from_cumsum(chunks.split_cumsum(g)[..., None], use_exp2)
        k, decay = k * suffix, decay * total
    if gk is not None:
        decay = decay * from_cumsum(chunks.split_cumsum(gk), use_exp2)[2]
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if packed else w.shape[1]
    states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)

    def step(states, chunk):
        n, w, u, k, decay = chunk
        S = chunking.read_state(states, n, packed)
        v_new = u_less_w_S(u, w, S, store)
        S_out = next_state(S, decay, k, v_new)
        return chunking.write_state(states, S_out, n, packed), (S, v_new)

    states, (h, v_new) = lax.scan(step, states, (chunks.table.sequence, w, u, k, decay))
    h = chunking.merge_states(h, state_v_first).astype(storage_dtype or dtype)
    return h, chunks.merge(v_new, storage_dtype), chunking.turn(states, state_v_first)


def chunk_gated_delta_rule_bwd_dhu(
    q: Array,
    k: Array,
    w: Array,
    do: Array,
    dv: Array,
    g: Array | None = None,
    gk: Array | None = None,
    h0: Array | None = None,
    dht: Array | None = None,
    scale: Scalar | None = None,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    chunk_indices: Array | None = None,
    chunk_offsets: Array | None = None,
    use_graph: bool = False,
    *,
    storage_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Stage 3 backwards, on its own: the cotangent of the state, from the last chunk to the first.

        dv <- dv + (k * d) dh      dh <- D(C<-0) dh + scale (q * c)^T do - w^T dv

    with D(C<-0) from the last row of g and gk, and d = exp2(g_C - g_j), c = exp2(g_i) of the scalar gate
    alone: KDA passes q = qg and k = kg, which hold their decays already, and gk.

    Args:
        q, k: [B, T, Hk, K], float64, float32, bfloat16 or float16, as everything here; Hk divides HV.
        w: [B, T, HV, K].
        do: [B, T, HV, V], the cotangent of o.
        dv: [B, T, HV, V], what v_new gets from o, of `chunk_kda_bwd_dAv`.
        g: [B, T, HV] or None, chunk-local cumulative sum of a scalar log decay, log2, finite.
        gk: [B, T, HV, K] or None, the same per key channel.
        h0: [N, HV, K, V], the initial state, for its shape; None where there was none.
        dht: [N, HV, K, V], the cotangent of the final state, or None for zeros.
        scale: a number; None is K ** -0.5.
        state_v_first: states are [..., V, K].
        cu_seqlens, chunk_size, chunk_indices, chunk_offsets, use_graph: as for `chunk_kda_fwd`.
        storage_dtype: round dh, dv and the operands of the products to it; None keeps them.

    Returns:
        dh [B, NT, HV, K, V], the cotangent of the state that leaves each chunk, dh0 [N, HV, K, V], that of
        the initial state, or None without h0, and dv [B, T, HV, V], that of v_new. dh and dv in
        `storage_dtype`, or else in the arithmetic's dtype, the widest of the arguments but h0, float32 or
        wider; dh0 in that dtype always. dv is zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.common.chunk_delta_h.chunk_gated_delta_rule_bwd_dhu`.
    """
    checks.flags(state_v_first=state_v_first)
    sizes = {}
    checks.tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), w=(w, "B T HV K"))
    checks.grouped("w", sizes)
    checks.tensors(sizes, do=(do, "B T HV V"), dv=(dv, "B T HV V"))
    if g is not None:
        checks.tensor("g", g, "B T HV", sizes)
    if gk is not None:
        checks.tensor("gk", gk, "B T HV K", sizes)
    packing = cu_seqlens, chunk_indices, use_graph, chunk_offsets
    cu_seqlens, chunk_size, NT = contracts.stage(sizes, chunk_size, *packing)
    for name, x in dict(h0=h0, dht=dht).items():
        if x is not None:
            checks.tensor(name, x, "N HV V K" if state_v_first else "N HV K V", sizes)
    dh, dh0, dv = _chunk_gated_delta_rule_bwd_dhu(
        *(q, k, w, do, dv, g, gk, dht, cu_seqlens),
        scale=checks.scale_or(scale, sizes["K"] ** -0.5),
        **dict(NT=NT, C=chunk_size, state_v_first=state_v_first, storage_dtype=checks.storage(storage_dtype)),
    )
    return dh, None if h0 is None else dh0, dv


@partial(jax.jit, static_argnames=("NT", "C", "scale", "state_v_first", "storage_dtype"))
def _chunk_gated_delta_rule_bwd_dhu(
    q, k, w, d_o, dv, g, gk, dht, cu_seqlens, *, NT, C, scale, state_v_first, storage_dtype
):
    T, HV, V = d_o.shape[1:]
    given = [x for x in (q, k, w, d_o, dv, g, gk, dht) if x is not None]
    dtype = jnp.result_type(jnp.float32, *given)
    store = storage(storage_dtype)
    chunks = chunking.Split(cu_seqlens, NT, T, C, HV, dtype)
    q, k, w, d_o, dv = (chunks.split(x) for x in (q, k, w, d_o, dv))
    decay = jnp.ones((*w.shape[:-2], w.shape[-1]), dtype)
    if g is not None:
        D_in, D_out, total = from_cumsum(chunks.split_cumsum(g)[..., None], use_exp2=True)
        q, k, decay = q * D_in, k * D_out, decay * total
    if gk is not None:
        decay = decay * from_cumsum(chunks.split_cumsum(gk), use_exp2=True)[2]
    packed = cu_seqlens is not None
    N = cu_seqlens.shape[0] - 1 if packed else w.shape[1]
    d_states = chunking.first_states(dht, N, HV, w.shape[-1], V, state_v_first, dtype)
    qg_d_o = scale * matmul_tn(store(q), store(d_o))

    def step(d_states, chunk):
        n, w, k, decay, qg_d_o, dv = chunk
        d_S_out = chunking.read_state(d_states, n, packed)
        dv = store(dv + matmul(k, store(d_S_out)))
        d_S = decay[..., None] * d_S_out + qg_d_o + u_less_w_S_backward(w, dv)
        return chunking.write_state(d_states, d_S, n, packed), (d_S_out, dv)

    scanned = chunks.table.sequence, w, k, decay, qg_d_o, dv
    d_states, (dh, dv) = lax.scan(step, d_states, scanned, reverse=True)
    dh = chunking.merge_states(dh, state_v_first).astype(storage_dtype or dtype)
    return dh, chunking.turn(d_states, state_v_first), chunks.merge(dv, storage_dtype)
