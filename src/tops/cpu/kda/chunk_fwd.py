"""The chunked forward: one scan over the chunks that runs the four stages and carries the state."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import checks, chunk_bwd, chunking
from .as_read import as_read
from .chunk_delta_h import delta_h, next_state
from .chunk_intra import intra, triangles
from .chunk_o import combine_o, of_state, reads
from .dot import PARTS, merge_channels, pick, spread, storage
from .gate import RCP_LN2, Activations, activate, cumsum
from .pullback import with_pullback
from .solve import solve
from .wy_fast import recompute_w_u


class ChunkKDAForward(NamedTuple):
    """The tensors of FLA's chunked forward, in FLA's order; None where they were not asked for."""

    o: jax.Array  # [B, T, HV, V]
    final_state: jax.Array | None  # [N, HV, K, V]
    g: jax.Array | None  # [B, T, HV, K]  chunk-local cumulative sum of the log decays, log2
    Aqk: jax.Array | None  # [B, T, HV, C]  row i of its chunk's matrix at token i
    Akk: jax.Array | None  # [B, T, HV, C]
    w: jax.Array | None  # [B, T, HV, K]
    u: jax.Array | None  # [B, T, HV, V]
    qg: jax.Array | None  # [B, T, HV, K]
    kg: jax.Array | None  # [B, T, HV, K]
    v_new: jax.Array | None  # [B, T, HV, V]
    h: jax.Array | None  # [B, NT, HV, K, V]  the state that enters each chunk
    initial_state: jax.Array | None  # as it came


def chunk_kda_fwd(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    chunk_indices=None,
    chunk_size=64,
    safe_gate=False,
    lower_bound=None,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    disable_recompute=False,
    return_intermediate_states=False,
    *,
    storage_dtype=None,
    transpose_state_layout=None,
):
    """The chunked KDA forward with every tensor that its four stages make.

        Aqk, Akk     the causal scores of a chunk, the inverse of its delta-rule system    stage 1
        w, u         w = Akk (beta k D(i<-0)), u = Akk (beta v)                            stage 2
        v_new, h     v_new = u - w S, S <- D(C<-0) S + kg^T v_new; h is S on entry         stage 3
        o            o = scale * qg S + Aqk v_new                                          stage 4

    with qg = q D(i<-0), kg = k D(C<-j), and D the decay over a token range.

    Args:
        q, k: [B, T, H, K]; float64, float32, bfloat16 or float16, one dtype for q, k and v.
        v: [B, T, HV, V]; HV = G * H, value head h reads q/k head h // G.
        g: [B, T, HV, K], log decay in nats, <= 0 (-inf is a reset); raw with `use_gate_in_kernel`.
        beta: [B, T, HV].
        scale: a number; None is K ** -0.5.
        initial_state: [N, HV, K, V], or None for zeros; N is the number of sequences (B when dense).
        output_final_state: whether to return the final state.
        state_v_first: states are [..., V, K] in `initial_state`, `final_state` and `h`.
        cu_seqlens: int32 or int64 [N + 1]; packs N sequences into B = 1, sequence n in tokens
            [cu_seqlens[n], cu_seqlens[n + 1]). Tokens from cu_seqlens[N] on are padding.
        chunk_indices: int32 or int64 [NT, 2] of `prepare_chunk_indices`; makes NT exact under `jit`, where it
            is (T + N * (C - 1)) // C otherwise.
        chunk_size: C, one of 16, 32, 64, 128.
        safe_gate: accepted for FLA's sake and held to its rules; this forward is safe for all gates.
        lower_bound: with `use_gate_in_kernel`, g <- lower_bound * sigmoid(exp(A_log) (g + dt_bias)).
        use_gate_in_kernel: g <- -exp(A_log) * softplus(g + dt_bias), unless `lower_bound` is given.
        A_log: [HV], for the gate; may be None beside `lower_bound`.
        dt_bias: [HV * K] or None, for the gate.
        disable_recompute: return w, u, qg, kg, v_new, h, and g also of an in-kernel gate.
        return_intermediate_states: return h.
        storage_dtype: round to it what FLA's kernels store in k's dtype (Aqk, Akk, w, u, qg, kg, v_new, h)
            and the operands that they round before a product; None keeps the arithmetic's dtype.
        transpose_state_layout: the deprecated name of `state_v_first`.

    Returns:
        `ChunkKDAForward`. o has v's dtype; final_state and g have the arithmetic's, promote_types(q.dtype,
        float32); the others have `storage_dtype`, or else the arithmetic's. All are zero where no sequence
        has a token or a chunk.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: Kimi Linear (arXiv 2510.26692), section 3; `fla.ops.kda.chunk_fwd.chunk_kda_fwd`.
    """
    state_v_first = checks.layout(state_v_first, transpose_state_layout)
    checks.flags(
        output_final_state=output_final_state,
        use_gate_in_kernel=use_gate_in_kernel,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )
    fields = ("o", "Aqk", "Akk")
    if disable_recompute or not use_gate_in_kernel:
        fields += ("g",)
    if disable_recompute:
        fields += ("w", "u", "qg", "kg", "v_new")
    if disable_recompute or return_intermediate_states:
        fields += ("h",)
    final_state, made = forward(
        *(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens, chunk_indices, chunk_size),
        *(A_log, dt_bias, Activations(gate=use_gate_in_kernel, lower_bound=lower_bound)),
        *(safe_gate, fields, storage_dtype),
    )
    made["final_state"] = final_state if output_final_state else None
    made["initial_state"] = initial_state
    return ChunkKDAForward(**{field: made.get(field) for field in ChunkKDAForward._fields})


def forward(
    q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens, chunk_indices, chunk_size,
    A_log, dt_bias, activations, safe_gate, fields, storage_dtype,
):  # fmt: skip
    """(final_state, {field: tensor}) after the checks: what `chunk_kda_fwd` and `chunk_kda` share."""
    scale = checks.forward(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, chunk_indices, q.shape[1])
    checks.gate(activations.gate, A_log, dt_bias, activations.lower_bound, safe_gate, g)
    storage_dtype = checks.storage(storage_dtype)
    NT = chunking.num_chunks(q.shape[1], cu_seqlens, chunk_indices, chunk_size)
    final_state, made = scan_chunks(
        *(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias),
        **dict(NT=NT, C=chunk_size, scale=scale, state_v_first=state_v_first),
        **dict(activations=activations, fields=fields, storage_dtype=storage_dtype),
    )
    if "h" in made:
        NT = chunking.exact_num_chunks(q.shape[1], cu_seqlens, chunk_indices, chunk_size)
        made["h"] = made["h"][:, :NT]
    return final_state, made


@partial(
    jax.jit,
    static_argnames=("NT", "C", "scale", "state_v_first", "activations", "fields", "storage_dtype"),
)
def scan_chunks(
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    *, NT, C, scale, state_v_first, activations, fields, storage_dtype,
):  # fmt: skip
    """The scan over NT chunks: reads a chunk, runs the stages on it, writes what `fields` names.

    Without fields it is the state pass alone, and nothing is done with q.
    """
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    packed = cu_seqlens is not None
    inputs = tuple(chunking.pad_tokens(x, C) for x in (q, k, v, g, beta))

    width = dict(o=V, g=K, Aqk=C, Akk=C, w=K, u=V, qg=K, kg=K, v_new=V)
    stored = {field: storage_dtype or dtype for field in (*width, "h")} | dict(o=v.dtype, g=dtype)
    # Before JAX 0.11 XLA widens all of a bfloat16 array at every update: round at the end there.
    wide = jax.__version_info__ < (0, 11)

    def prepare(rows, parameters, length=None):
        q, k, v, g, beta = (x.astype(dtype) for x in rows)
        q, k, g, beta = activate(q, k, g, beta, *parameters, activations, storage(storage_dtype))
        if activations.gate:  # an activated gate is not 0 where there is no token
            g = chunking.keep_rows(g, length)
        return q, k, v, g, beta

    def run(states, inputs, parameters):
        # Without padding all of a buffer is written over. Of two with the same in them XLA copies one.
        buffers = {
            field: jnp.full(
                (B, max(T, C), HV, width[field]), 0 if packed else i, dtype if wide else stored[field]
            )
            for i, field in enumerate(fields)
            if field != "h"
        }

        def compute(S, length, *rows):
            rows = prepare(rows, parameters, length)
            heads = (chunking.split_heads(x, HV) for x in rows)
            S, made = one_chunk(S, *heads, scale, storage_dtype, tuple(x for x in buffers if x != "g"))
            made = {field: chunking.merge_heads(x) for field, x in made.items()}
            if "g" in buffers:
                made["g"] = cumsum(RCP_LN2 * rows[3], axis=1)
            return S, made

        def idle(S, *_):
            return S, {field: jnp.zeros((B, C, HV, width[field]), dtype) for field in buffers}

        # Of a chunk, its gradient keeps the state that entered it.
        @partial(jax.checkpoint, prevent_cse=False)
        def chunk_step(S, start, length):
            rows = [chunking.cut(x, start, length, C) for x in inputs]
            if not packed:
                return compute(S, length, *rows)
            # NT is a bound: skip the chunks that this packing does not need. The gradient recomputes them
            # inside its branch, since what leaves a branch is copied.
            computed = jax.checkpoint(compute, prevent_cse=False)
            return lax.cond(length > 0, computed, idle, S, length, *rows)

        def step(carry, chunk):
            states, buffers = carry
            n, start, length = chunk
            S = chunking.read_state(states, n, packed)
            h = S if "h" in fields else None
            if h is not None and packed:
                h = jnp.where(length > 0, h, 0)
            S, rows = chunk_step(S, start, length)
            states = chunking.write_state(states, S, n, packed)
            buffers = {field: chunking.put(x, rows[field], start, length) for field, x in buffers.items()}
            return (states, buffers), None if h is None else h.astype(stored["h"])

        chunks = chunking.chunk_table(cu_seqlens, NT, C) if packed else chunking.dense_table(T, C)
        (states, made), h = lax.scan(step, (states, buffers), chunks)
        return states, made, h

    if fields == ("o",) and storage_dtype is None and not packed and chunk_bwd.fits(q, k, v, g, C, dtype):
        one = partial(_one_chunk_as_read, scale=scale)
        run = with_pullback(
            run, partial(chunk_bwd.keep, prepare, one, C), partial(chunk_bwd.pull, prepare, scale, C)
        )
    N = cu_seqlens.shape[0] - 1 if packed else B
    states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)
    states, made, h = run(states, inputs, (A_log, dt_bias))
    made = {field: x[:, :T].astype(stored[field]) for field, x in made.items()}
    if "h" in fields:
        made["h"] = chunking.merge_states(h, state_v_first)
    return chunking.turn(states, state_v_first), made


@partial(jax.custom_jvp, nondiff_argnums=(6, 7, 8))
def one_chunk(S, q, k, v, g, beta, scale, storage_dtype, fields):
    """`_stages` with its sums over channels in PARTS parts, and a rule for its gradient."""
    return _stages(S, q, k, v, g, beta, scale, storage_dtype, fields, PARTS)


@as_read
def _one_chunk_as_read(S, *arrays, scale, fields):
    return one_chunk(S, *arrays, scale, None, fields)


@one_chunk.defjvp
def _one_chunk_jvp(scale, storage_dtype, fields, primals, tangents):
    """A gradient, which recomputes the chunk, sums over channels in one part: two cost it 6 % of its time.
    Where it asks for no o, the state pass alone makes its states, but not those of rounded w and u."""
    stages = partial(_stages, scale=scale, storage_dtype=storage_dtype, fields=fields, parts=1)
    _, made = jax.jvp(stages, primals, tangents)
    if storage_dtype is None:
        return _one_chunk_as_read(*primals, scale=scale, fields=fields), made
    return one_chunk(*primals, scale, storage_dtype, fields), made


def _stages(S, q, k, v, g, beta, scale, storage_dtype, fields, parts):
    """The four stages on one chunk: the state that leaves it, and what they made of `fields`.

    S [..., K, V], the state that enters; q, k, g [..., C, K]; v [..., C, V]; beta [..., C]. `fields` may name
    what `chunk_bwd` keeps, too.

    Stages 2 and 3 meet in `v_new = Akk beta (v - k_in S)`, which is `u - w S` without u and w. With a
    `storage_dtype` they go apart, as in FLA's kernels, which round u and w.
    """
    if set(fields) <= set(chunk_bwd.KEPT):
        chunk = intra(None, k, jnp.exp(g), beta, parts)
        S_next, v_new, read = _pass_on(S, chunk, v, beta)
        made = dict(written=chunk_bwd.written(v_new, v - read, beta), inverse=chunk.inverse)
        return S_next, {field: made[field] for field in fields}
    store = storage(storage_dtype)
    chunk = intra(q, k, jnp.exp(g), beta, parts)
    x_in, kg = merge_channels(chunk.x_in), merge_channels(chunk.kg)
    made = {}
    if storage_dtype is not None or {"Aqk", "Akk", "w", "u"} & set(fields):
        made["Aqk"], made["Akk"] = (store(x) for x in triangles(chunk, beta, scale))
    if storage_dtype is not None or {"w", "u"} & set(fields):
        made["w"], made["u"] = recompute_w_u(made["Akk"], x_in[..., 1::2, :], v, beta, store)
    made |= dict(qg=store(x_in[..., 0::2, :]), kg=store(kg))
    if storage_dtype is None:
        S_next, v_new, read = _pass_on(S, chunk, v, beta)
        o = scale * read
    else:
        v_new, S_next = delta_h(S, made["w"], made["u"], made["kg"], chunk.decay, store)
        o = combine_o(S, made["qg"], made["Aqk"], v_new, scale, store)
    made |= dict(o=o, v_new=v_new)
    if set(chunk_bwd.KEPT) & set(fields):
        read = pick(reads(S, chunk.x_in, chunk.inside, chunk.below, v_new), -2, 1)
        made |= dict(written=chunk_bwd.written(v_new, v - read, beta), inverse=chunk.inverse)
    return S_next, {field: made[field] for field in fields}


def _pass_on(S, chunk, v, beta):
    """Stages 2 and 3 in one: the state that leaves the chunk, v_new, and o / scale.

    Of an `Intra` without q, the last is what k reads, in place of q: `v - v_new / beta`.
    """
    seen = of_state(S, chunk.x_in).reshape(*v.shape[:-1], -1, v.shape[-1])
    R = seen.shape[-2]
    r = spread(beta[..., None], -1, v.shape[-1]) * (v - pick(seen, -2, R - 1))
    v_new, read = solve(chunk, beta, r)
    return next_state(S, chunk.kg, v_new, chunk.decay), v_new, pick(seen, -2, 0) + read
