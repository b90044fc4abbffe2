"""All chunks: the scan forward, the scan back over them, and the one rule that joins the two."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import chunking, one_chunk
from .activations import RCP_LN2, Activations, activate, cumsum
from .one_chunk.xla import UPDATES_WIDEN, barrier
from .pullback import with_pullback
from .rounding import beta_k_storage, storage


class Config(NamedTuple):
    """What a scan is compiled for, beside the shapes."""

    C: int
    scale: float
    activations: Activations
    fields: tuple  # the tensors to return; () without a storage_dtype is the state pass alone, without q
    storage_dtype: np.dtype | None
    output_dtype: np.dtype  # of o
    packed: bool


@partial(jax.jit, static_argnames=("NT", "state_v_first", "config"))
def scan_chunks(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, *, NT, state_v_first, config):
    """The final states [N, HV, K, V] and {field: tensor}, of a call whose arguments have been checked."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    N = cu_seqlens.shape[0] - 1 if config.packed else B
    states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)
    inputs = tuple(chunking.pad_tokens(x, config.C) for x in (q, k, v, g, beta))
    parameters = jax.tree.map(lambda x: x.astype(dtype), (A_log, dt_bias))
    if config.packed:
        chunks = chunking.chunk_table(cu_seqlens, NT, config.C)
    else:
        chunks = chunking.dense_table(T, config.C)
    run = partial(forward_scan, config)
    # Of other fields, and of what is rounded, the gradient is JAX's own of the plain scan.
    if config.storage_dtype is None and set(config.fields) <= {"o", "h"}:
        run = with_pullback(run, partial(run, keep=True), partial(backward_scan, config))
    states, tensors, h = run(chunks, states, inputs, parameters)
    tensors = {field: x[:, :T] for field, x in tensors.items()}
    if "h" in config.fields:
        tensors["h"] = chunking.merge_states(h, state_v_first).astype(config.storage_dtype or dtype)
    return chunking.turn(states, state_v_first), tensors


def forward_scan(config, chunks, states, inputs, parameters, keep=False):
    """The final states, {field: [B, T, HV, ...]}, and h [NT, B, HV, K, V], the states that enter the
    chunks, or None.

    With `keep` also what `backward_scan` reads: h, and the errors e [NT, B, HV, C, V].
    """
    (B, T, HV, V), K, C, dtype = inputs[2].shape, inputs[0].shape[-1], config.C, states.dtype
    widths = dict(o=V, g=K, Aqk=C, Akk=C, w=K, u=V, qg=K, kg=K, v_new=V)
    widths = {field: width for field, width in widths.items() if field in config.fields}
    # FLA's kernel of beta's sigmoid returns float32.
    beta_dtype = inputs[4].dtype if config.activations.beta_scale is None else dtype
    stores = storage(config.storage_dtype), beta_k_storage(config.storage_dtype, beta_dtype)
    stored = dict.fromkeys(widths, config.storage_dtype or dtype) | dict(o=config.output_dtype, g=dtype)

    def compute(S, length, *rows):
        S, tensors = _stages(config, stores, S, *_heads(config, length, rows, parameters))
        rows = {field: chunking.merge_heads(tensors[field]) for field in widths}
        return S, rows, tensors["e"] if keep else None

    def idle(S, *_):
        rows = {field: jnp.zeros((B, C, HV, width), dtype) for field, width in widths.items()}
        return S, rows, jnp.zeros((B, HV, C, V), dtype) if keep else None

    def step(carry, chunk):
        states, buffers = carry
        n, start, length = chunk
        rows = [chunking.cut(x, start, length, C) for x in inputs]
        S = h = chunking.read_state(states, n, config.packed)
        if config.packed:  # NT is a bound: what this packing does not need is skipped, and its h is zero
            S, tensors, e = lax.cond(length > 0, compute, idle, S, length, *rows)
            h = jnp.where(length > 0, h, 0)
        else:
            S, tensors, e = compute(S, length, *rows)
        states = chunking.write_state(states, S, n, config.packed)
        buffers = {field: chunking.put(x, tensors[field], start, length) for field, x in buffers.items()}
        return (states, buffers), (h if keep or "h" in config.fields else None, e)

    buffers = _buffers({field: ((B, T, HV, widths[field]), stored[field]) for field in widths}, config, dtype)
    (states, tensors), kept = lax.scan(step, (states, buffers), chunks)
    tensors = {field: x.astype(stored[field]) for field, x in tensors.items()}
    results = states, tensors, kept[0] if "h" in config.fields else None
    return (results, kept) if keep else results


def backward_scan(config, chunks, args, kept, cotangents, wanted):
    """The cotangents of the states, the inputs and the parameters, from the last chunk to the first.

    Reads the state that entered a chunk and the errors of its tokens, makes stage 1 again, and runs the
    stages backwards. Of inputs that are not `wanted` it returns anything.
    """
    _, inputs, parameters = args
    d_states, d_tensors, d_h = cotangents
    HV, C, dtype = inputs[2].shape[2], config.C, d_states.dtype
    wanted = [i for i, is_wanted in enumerate(wanted[1]) if is_wanted]

    def compute(d_S, S, e, length, d_o, *rows):
        (q, k, _, g, beta), pull_heads = jax.vjp(partial(_heads, config, length), rows, parameters)
        if d_o is None:  # the state pass alone
            d_S, _, *d_others = one_chunk.backward(S, e, None, k, g, beta, config.scale, d_S, None)
            d_heads = jnp.zeros_like(q), *d_others
        else:
            d_o = chunking.split_heads(d_o.astype(dtype), HV)
            d_S, *d_heads = one_chunk.backward(S, e, q, k, g, beta, config.scale, d_S, d_o)
        d_rows, d_parameters = pull_heads(tuple(d_heads))
        # XLA is faster when all of a chunk's gradients are complete before any is put in its place.
        return d_S, barrier({i: d_rows[i] for i in wanted}), d_parameters

    def idle(d_S, S, e, length, d_o, *rows):
        return d_S, {i: jnp.zeros_like(rows[i]) for i in wanted}, jax.tree.map(jnp.zeros_like, parameters)

    def step(carry, chunk):
        d_states, d_inputs, d_parameters = carry
        (n, start, length), (S, e), d_h = chunk
        rows = [chunking.cut(x, start, length, C) for x in inputs]
        d_o = chunking.cut(d_tensors["o"], start, length, C) if d_tensors else None
        d_S = chunking.read_state(d_states, n, config.packed)
        if config.packed:
            d_S, d_rows, d_here = lax.cond(length > 0, compute, idle, d_S, S, e, length, d_o, *rows)
            d_h = None if d_h is None else jnp.where(length > 0, d_h, 0)
        else:
            d_S, d_rows, d_here = compute(d_S, S, e, length, d_o, *rows)
        d_states = chunking.write_state(d_states, d_S if d_h is None else d_S + d_h, n, config.packed)
        d_inputs = {i: chunking.put(x, d_rows[i], start, length) for i, x in d_inputs.items()}
        return (d_states, d_inputs, jax.tree.map(jnp.add, d_parameters, d_here)), None

    d_inputs = _buffers({i: (inputs[i].shape, inputs[i].dtype) for i in wanted}, config, dtype)
    carry = d_states, d_inputs, jax.tree.map(jnp.zeros_like, parameters)
    (d_states, d_inputs, d_parameters), _ = lax.scan(step, carry, (chunks, kept, d_h), reverse=True)
    return d_states, tuple(d_inputs.get(i, x).astype(x.dtype) for i, x in enumerate(inputs)), d_parameters


def _heads(config, length, rows, parameters):
    """A chunk's rows of q, k, v, g, beta [B, C, H, ...] as the stages take them: activated, heads first."""
    dtype = jnp.promote_types(rows[0].dtype, jnp.float32)
    q, k, v, g, beta = (x.astype(dtype) for x in rows)
    q, k, g, beta = activate(q, k, g, beta, *parameters, config.activations, storage(config.storage_dtype))
    if config.activations.gate:  # an activated gate is not 0 where there is no token
        g = chunking.keep_rows(g, length)
    return tuple(chunking.split_heads(x, v.shape[2]) for x in (q, k, v, g, beta))


def _stages(config, stores, S, q, k, v, g, beta):
    """The state that leaves a chunk, and its tensors by name. `stores` is `as_fla`'s."""
    if config.storage_dtype is not None:
        S, tensors = one_chunk.as_fla(S, q, k, v, g, beta, config.scale, *stores)
    else:
        q = q if config.fields else None
        S, tensors, chunk = one_chunk.forward(S, q, k, v, g, beta, config.scale)
        if not set(config.fields) <= {"o", "h"}:
            beta_k_in = beta[..., None] * chunk.k_in
            tensors |= one_chunk.matrices(chunk, v, beta, config.scale, storage(None), beta_k_in)
    if "g" in config.fields:
        tensors["g"] = cumsum(RCP_LN2 * g, axis=2)
    return S, tensors


def _buffers(arrays, config, wide):
    """Arrays of a shape and dtype, for chunk after chunk to be put into.

    A dense call overwrites all that is returned, so any number may stand here. Each buffer gets another: of
    two equal ones XLA makes one and copies it.
    """
    return {
        name: jnp.full(shape, 0 if config.packed else i + 1, wide if UPDATES_WIDEN else dtype)
        for i, (name, (shape, dtype)) in enumerate(arrays.items())
    }
