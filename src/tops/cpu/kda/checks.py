"""The argument contracts: every error message of the package.

Shapes, dtypes and flags are checked always, values where they are concrete. A message is one line: the
argument's name, what was expected with the actual numbers, and what came.
"""

import functools
import inspect
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from .chunking import max_num_chunks, prepare_chunk_indices

CHUNK_SIZES = (16, 32, 64, 128)
FLOATS = ("float64", "float32", "bfloat16", "float16")


def forward(q, k, v, g, beta, scale, initial_state, state_v_first=False, cu_seqlens=None):
    """The contract that every forward op shares; returns the scale, K ** -0.5 for None."""
    for name, x in dict(q=q, k=k, v=v, g=g, beta=beta).items():
        _floating(name, x)
    _require(q.ndim == 4, "q", "a shape [B, T, H, K]", q.shape)
    B, T, H, K = q.shape
    _require(T >= 1 and H >= 1 and K >= 1, "q", "[B, T, H, K] with T, H and K of at least 1", q.shape)
    _shape("k", k, "B T H K", q.shape)
    _require(v.ndim == 4, "v", "a shape [B, T, HV, V]", v.shape)
    HV, V = v.shape[2:]
    _shape("v", v, "B T HV V", (B, T, HV, V))
    _require(HV >= 1 and V >= 1, "v", "[B, T, HV, V] with HV and V of at least 1", v.shape)
    _require(HV % H == 0, "v", f"[B, T, HV, V] with HV a multiple of H={H}", v.shape)
    _shape("g", g, "B T HV K", (B, T, HV, K))
    _shape("beta", beta, "B T HV", (B, T, HV))
    for name, x in dict(k=k, v=v).items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    for name, x in dict(g=g, beta=beta).items():
        _no_wider(name, x, q.dtype)
    N = B
    if cu_seqlens is not None:
        sequences(cu_seqlens, B, T)
        N = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _floating("initial_state", initial_state)
        _no_wider("initial_state", initial_state, q.dtype)
        letters, sizes = ("N HV V K", (N, HV, V, K)) if state_v_first else ("N HV K V", (N, HV, K, V))
        _shape("initial_state", initial_state, letters, sizes)
    if scale is None:
        return K**-0.5
    _number("scale", scale)
    return float(scale)


def guarded(op):
    """`op` behind the contract of `forward`: for the oracle, whose module imports nothing of the package."""
    signature = inspect.signature(op)

    @functools.wraps(op)
    def checked(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        contract = inspect.signature(forward).parameters
        forward(**{name: x for name, x in arguments.arguments.items() if name in contract})
        return op(*args, **kwargs)

    return checked


def chunks(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_size`, and `chunk_indices [NT, 2]` against the sequences that it lists."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
        raise TypeError(f"chunk_size: expected one of {CHUNK_SIZES}, got {type(chunk_size).__name__}")
    _require(chunk_size in CHUNK_SIZES, "chunk_size", f"one of {CHUNK_SIZES}", chunk_size)
    if chunk_indices is None:
        return
    _require(cu_seqlens is not None, "chunk_indices", "None without cu_seqlens", _describe(chunk_indices))
    _integers("chunk_indices", chunk_indices)
    _require(
        chunk_indices.ndim == 2 and chunk_indices.shape[1] == 2,
        "chunk_indices",
        "a shape [NT, 2]",
        chunk_indices.shape,
    )
    most = max_num_chunks(T, cu_seqlens.shape[0] - 1, chunk_size)
    NT = chunk_indices.shape[0]
    _require(most >= NT, "chunk_indices", f"[NT, 2] with NT of at most {most}", chunk_indices.shape)
    if _concrete(cu_seqlens) and _concrete(chunk_indices):
        exact = np.asarray(prepare_chunk_indices(np.asarray(cu_seqlens), chunk_size))
        _require(
            np.array_equal(exact, np.asarray(chunk_indices)),
            "chunk_indices",
            f"the {len(exact)} chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, {chunk_size}))",
            f"{NT} chunks that differ",
        )


def gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate, g):
    """The options of the in-kernel gate, for g [B, T, HV, K]."""
    if not use_gate_in_kernel:
        for name, x in dict(A_log=A_log, dt_bias=dt_bias).items():
            _require(x is None, name, "None without use_gate_in_kernel", _describe(x))
        return
    _require(
        A_log is not None or lower_bound is not None,
        "A_log",
        "an array [HV] with use_gate_in_kernel unless lower_bound is given",
        "None",
    )
    if lower_bound is not None:
        _number("lower_bound", lower_bound)
    if safe_gate:
        in_range = lower_bound is not None and -5 <= lower_bound < 0
        _require(
            in_range, "lower_bound", "a number in [-5, 0) with safe_gate and use_gate_in_kernel", lower_bound
        )
    HV, K = g.shape[2:]
    for name, x, letters, sizes in (("A_log", A_log, "HV", (HV,)), ("dt_bias", dt_bias, "HV*K", (HV * K,))):
        if x is not None:
            _floating(name, x)
            _no_wider(name, x, g.dtype)
            _shape(name, x, letters, sizes)


def sequences(cu_seqlens, B, T):
    """`cu_seqlens [N + 1]`: 0 = cu_seqlens[0] <= ... <= cu_seqlens[N] <= T, with B = 1."""
    _integers("cu_seqlens", cu_seqlens)
    _require(
        cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2,
        "cu_seqlens",
        "a shape [N + 1] with N of at least 1",
        cu_seqlens.shape,
    )
    _require(B == 1, "cu_seqlens", "a batch of B=1 that holds the packed sequences", f"B={B}")
    if _concrete(cu_seqlens):
        ends = np.asarray(cu_seqlens)
        _require(ends[0] == 0, "cu_seqlens", "a first entry of 0", ends[0])
        drops = np.flatnonzero(np.diff(ends) < 0)
        if drops.size:
            n = drops[0]
            _require(False, "cu_seqlens", "entries that do not decrease", f"{ends[n]}, {ends[n + 1]} at {n}")
        _require(ends[-1] <= T, "cu_seqlens", f"a last entry of at most T={T}", ends[-1])


def _require(holds, name, expected, came):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {came}")


def _number(name, x):
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_describe(x)}")
    _require(math.isfinite(x), name, "a finite number", x)


def _shape(name, x, letters, sizes):
    expected = f"[{letters.replace(' ', ', ')}] = {tuple(sizes)}"
    _require(x.shape == tuple(sizes), name, expected, tuple(x.shape))


def _array(name, x, kind):
    if not isinstance(x, (np.ndarray, jax.Array)):
        raise TypeError(f"{name}: expected {kind}, got {_describe(x)}")
    if isinstance(x, np.ndarray) and x.dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(f"{name}: expected float32 or less while jax_enable_x64 is off, got float64")


def _floating(name, x):
    kind = "an array of " + ", ".join(FLOATS)
    _array(name, x, kind)
    if x.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected {kind}, got {_describe(x)}")


def _integers(name, x):
    _array(name, x, "an integer array")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer array, got {_describe(x)}")


def _no_wider(name, x, dtype):
    """Arithmetic is in promote_types(q.dtype, float32): a wider operand would be cast down."""
    accumulator = jnp.promote_types(dtype, jnp.float32)
    if jnp.promote_types(x.dtype, accumulator) != accumulator:
        raise TypeError(f"{name}: expected at most {accumulator}, as q is {dtype}, got {x.dtype}")


def _describe(x):
    return f"an array of {x.dtype}" if hasattr(x, "dtype") else type(x).__name__


def _concrete(x):
    return not isinstance(x, jax.core.Tracer)
