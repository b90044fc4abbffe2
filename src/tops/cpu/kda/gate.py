"""The gates on their own, and the chunk-local cumulative sum that FLA's contract returns."""

import jax
import jax.numpy as jnp

from . import checks, chunking, contracts
from .activations import cumsum, log_decay
from .types import Array, DType, Scalar, Sequences


def kda_gate_fwd(
    g: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    output_dtype: DType | None = jnp.float32,
) -> jax.Array:
    """The log decay of raw gates.

        lower_bound is None:  -exp(A_log) * softplus(g + dt_bias)
        else:                 lower_bound * sigmoid(exp(A_log) * (g + dt_bias))

    Args:
        g: [..., HV, K], raw; float64, float32, bfloat16 or float16, as everything here.
        A_log: [HV] or [1, 1, HV, 1]; may be None beside `lower_bound`: then exp(A_log) is 1.
        dt_bias: [HV * K] or [HV, K], or None.
        lower_bound: a number or None.
        output_dtype: the dtype of the result; None is g's.

    Returns:
        [..., HV, K], log decay in nats.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.gate.kda_gate_fwd`, `fused_kda_gate`.
    """
    A_log, dt_bias = contracts.raw_gate(g, A_log, dt_bias, lower_bound)
    output_dtype = checks.storage(output_dtype, "output_dtype")
    A_log, dt_bias = (None if x is None else _widen(x) for x in (A_log, dt_bias))
    return log_decay(_widen(g), A_log, dt_bias, lower_bound).astype(output_dtype or g.dtype)


fused_kda_gate = kda_gate_fwd


def naive_kda_gate(
    g: Array,
    A_log: Array | None,
    dt_bias: Array | None = None,
    output_dtype: DType | None = jnp.float32,
) -> jax.Array:
    """`kda_gate_fwd` without a lower bound, under FLA's name: -exp(A_log) * softplus(g + dt_bias)."""
    return kda_gate_fwd(g, A_log, dt_bias, None, output_dtype)


def naive_kda_lowerbound_gate(
    g: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float = -5.0,
    output_dtype: DType | None = jnp.float32,
) -> jax.Array:
    """`kda_gate_fwd` with a lower bound, named as in FLA: lower_bound * sigmoid(exp(A_log) (g + dt_bias))."""
    checks.number("lower_bound", lower_bound)
    return kda_gate_fwd(g, A_log, dt_bias, lower_bound, output_dtype)


def kda_gate_bwd(
    g: Array,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    dyg: Array | None = None,
    lower_bound: float | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients of `kda_gate_fwd`.

        lower_bound is None:  dg = -exp(A_log) sigmoid(g + dt_bias) dyg
                              dA = sum dyg * kda_gate_fwd(g)
        else, with x = exp(A_log) (g + dt_bias):
                              dg = lower_bound exp(A_log) sigmoid'(x) dyg
                              dA = lower_bound sum x sigmoid'(x) dyg
        dbias = sum dg

    where dA is summed over all but HV, dbias over all but HV and K. A gate beyond 1e30 or -1e30 has the
    gradients of that one.

    Args:
        g, A_log, dt_bias, lower_bound: as for `kda_gate_fwd`.
        dyg: [..., HV, K], the cotangent of the log decay in nats.

    Returns:
        dg, dA and dbias in the shape and dtype of what they are the gradients of: g, A_log and dt_bias; None
        where that was not given.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.kda.gate.kda_gate_bwd`.
    """
    contracts.raw_gate(g, A_log, dt_bias, lower_bound)
    checks.like("dyg", dyg, "g", g)
    dtype = jnp.result_type(jnp.float32, g, dyg)

    def gate(g, *parameters):
        A_log, dt_bias = (None if x is None else x.reshape(-1).astype(dtype) for x in parameters)
        return log_decay(g.astype(dtype), A_log, dt_bias, lower_bound)

    given = (None if x is None else jnp.asarray(x) for x in (g, A_log, dt_bias))
    return jax.vjp(gate, *given)[1](jnp.asarray(dyg, dtype))


def chunk_local_cumsum(
    g: Array,
    chunk_size: int,
    reverse: bool = False,
    scale: Scalar | None = None,
    cu_seqlens: Sequences | None = None,
    output_dtype: DType | None = jnp.float32,
    chunk_indices: Array | None = None,
    use_graph: bool = False,
) -> jax.Array:
    """The cumulative sum over each chunk: G_i = scale * (g_1 + ... + g_i), or g_i + ... + g_C with `reverse`.

    Args:
        g: [B, T, HV] or [B, T, HV, K]; float64, float32, bfloat16 or float16.
        chunk_size: C, a power of two of at least 8.
        reverse: sum from the chunk's end.
        scale: a number, None is 1; 1 / ln 2 turns nats into log2.
        cu_seqlens, chunk_indices: as for `chunk_kda_fwd`.
        output_dtype: the dtype of the result; None is g's.
        use_graph: accepted for FLA's sake, without effect: under `jit` one program serves every cu_seqlens.

    Returns:
        The shape of g, in g's unit times `scale`; zero at padding.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.utils.cumsum.chunk_local_cumsum`.
    """
    checks.flags(reverse=reverse)
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    letters = "B T HV" if getattr(g, "ndim", None) == 3 else "B T HV K"
    chunk_size, scale = contracts.cumsum(g, letters, chunk_size, scale, cu_seqlens, chunk_indices)
    output_dtype = checks.storage(output_dtype, "output_dtype") or g.dtype
    return _chunk_local_cumsum(g, chunk_size, reverse, scale, cu_seqlens, output_dtype, chunk_indices)


def _chunk_local_cumsum(g, C, reverse, scale, cu_seqlens, output_dtype, chunk_indices):
    NT = chunking.exact_num_chunks(g.shape[1], cu_seqlens, chunk_indices, C)
    dtype = jnp.promote_types(g.dtype, jnp.float32)
    chunks = chunking.Split(cu_seqlens, NT, g.shape[1], C, g.shape[2], dtype)
    return chunks.merge(cumsum(scale * chunks.split(g), 3, reverse), output_dtype)


def kda_gate_chunk_cumsum(
    g: Array,
    A_log: Array | None,
    chunk_size: int,
    scale: Scalar | None = None,
    dt_bias: Array | None = None,
    cu_seqlens: Sequences | None = None,
    output_dtype: DType | None = jnp.float32,
    chunk_indices: Array | None = None,
    lower_bound: float | None = None,
    use_graph: bool = False,
) -> jax.Array:
    """`chunk_local_cumsum` of `kda_gate_fwd`, with their arguments: what `chunk_kda_fwd` returns as g.

    Source: `fla.ops.kda.gate.kda_gate_chunk_cumsum`.
    """
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    chunk_size, scale = contracts.cumsum(g, "B T HV K", chunk_size, scale, cu_seqlens, chunk_indices)
    output_dtype = checks.storage(output_dtype, "output_dtype") or g.dtype
    decay = kda_gate_fwd(g, A_log, dt_bias, lower_bound, jnp.promote_types(g.dtype, jnp.float32))
    return _chunk_local_cumsum(decay, chunk_size, False, scale, cu_seqlens, output_dtype, chunk_indices)


def _widen(x):
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
