"""The argument contracts: every error message of the package.

Shapes, dtypes and flags are checked always, values where they are concrete. A message is one line: the
argument's name, what was expected with the actual numbers, and what came.
"""

import functools
import inspect
import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from .chunking import concrete, max_num_chunks, prepare_chunk_indices

CHUNK_SIZES = (16, 32, 64, 128)
FLOATS = ("float64", "float32", "bfloat16", "float16")


def forward(q, k, v, g, beta, scale, initial_state, state_v_first=False, cu_seqlens=None):
    """The contract that every forward op shares; returns the scale, K ** -0.5 for None."""
    sizes = {}
    tensor("q", q, "B T H K", sizes)
    tensor("k", k, "B T H K", sizes)
    tensor("v", v, "B T HV V", sizes)
    grouped("v", sizes)
    tensor("g", g, "B T HV K", sizes)
    tensor("beta", beta, "B T HV", sizes)
    for name, x in dict(k=k, v=v).items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
    for name, x in dict(g=g, beta=beta).items():
        _no_wider(name, x, q.dtype)
    sequences(cu_seqlens, sizes)
    states(initial_state, state_v_first, q.dtype, sizes)
    return number_or("scale", scale, sizes["K"] ** -0.5)


def tensor(name, x, letters, sizes):
    """x is a floating array of shape `letters`; `sizes` holds the letters known so far, and learns others."""
    _floating(name, x)
    letters = letters.split()
    shape = f"[{', '.join(letters)}]"
    _require(x.ndim == len(letters), name, f"a shape {shape}", tuple(x.shape))
    known = [sizes.get(letter, size) for letter, size in zip(letters, x.shape, strict=True)]
    expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    _require(
        tuple(known) == tuple(x.shape), name, f"{shape} = ({expected}{',' * (len(letters) == 1)})", x.shape
    )
    _require(min(x.shape) >= 1, name, f"{shape} with each of at least 1", tuple(x.shape))
    sizes.update(zip(letters, x.shape, strict=True))


def grouped(name, sizes):
    """Value head h reads q/k head h // (HV / H)."""
    H, HV = sizes["H"], sizes["HV"]
    _require(HV % H == 0, name, f"HV a multiple of H={H}", f"HV={HV}")


def states(initial_state, state_v_first, dtype, sizes):
    """`initial_state [N, HV, K, V]`, no wider than the arithmetic of `dtype`."""
    if initial_state is not None:
        tensor("initial_state", initial_state, "N HV V K" if state_v_first else "N HV K V", sizes)
        _no_wider("initial_state", initial_state, dtype)


def number_or(name, x, default):
    """A finite Python number as a float; `default` for None."""
    if x is None:
        return default
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_describe(x)}")
    _require(math.isfinite(x), name, "a finite number", x)
    return float(x)


def layout(state_v_first, transpose_state_layout):
    """`state_v_first`, which `transpose_state_layout` was called once."""
    if transpose_state_layout is None:
        return state_v_first
    _require(not state_v_first, "transpose_state_layout", "None beside state_v_first", transpose_state_layout)
    message = "transpose_state_layout is deprecated: it is called state_v_first"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return transpose_state_layout


def storage(dtype, name="storage_dtype"):
    """A floating dtype as NumPy's, or None."""
    try:
        known = dtype is None or jnp.dtype(dtype).name in FLOATS
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"{name}: expected None or one of {', '.join(FLOATS)}, got {dtype!r}")
    return None if dtype is None else jnp.dtype(dtype)


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
        raise TypeError(f"chunk_size: expected one of {CHUNK_SIZES}, got {_describe(chunk_size)}")
    _require(chunk_size in CHUNK_SIZES, "chunk_size", f"one of {CHUNK_SIZES}", chunk_size)
    if chunk_indices is None:
        return
    _require(cu_seqlens is not None, "chunk_indices", "None without cu_seqlens", _describe(chunk_indices))
    _integers("chunk_indices", chunk_indices)
    pairs = chunk_indices.ndim == 2 and chunk_indices.shape[1] == 2
    _require(pairs, "chunk_indices", "a shape [NT, 2]", chunk_indices.shape)
    NT, most = chunk_indices.shape[0], max_num_chunks(T, cu_seqlens.shape[0] - 1, chunk_size)
    _require(most >= NT, "chunk_indices", f"[NT, 2] with NT of at most {most}", chunk_indices.shape)
    if concrete(cu_seqlens) and concrete(chunk_indices):
        exact = prepare_chunk_indices(cu_seqlens, chunk_size)
        expected = f"the {len(exact)} chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, {chunk_size}))"
        same = np.array_equal(exact, np.asarray(chunk_indices))
        _require(same, "chunk_indices", expected, f"{NT} chunks that differ")


def safe_gate(safe, lower_bound, needed=False):
    """FLA's rules for `safe_gate`: with it, `lower_bound` lies in [-5, 0); it must be given if `needed`."""
    number_or("lower_bound", lower_bound, None)
    if safe and (needed or lower_bound is not None):
        in_range = lower_bound is not None and -5 <= lower_bound < 0
        _require(in_range, "lower_bound", "a number in [-5, 0) with safe_gate", lower_bound)


def gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe, g):
    """The options of the in-kernel gate, for g [B, T, HV, K]."""
    safe_gate(safe, lower_bound, needed=use_gate_in_kernel)
    if use_gate_in_kernel:
        raw_gate(g, A_log, dt_bias, lower_bound)
        return
    for name, x in dict(A_log=A_log, dt_bias=dt_bias).items():
        _require(x is None, name, "None without use_gate_in_kernel", _describe(x))


def raw_gate(g, A_log, dt_bias, lower_bound):
    """A gate activation's arguments, for g [..., HV, K]."""
    _floating("g", g)
    _require(g.ndim >= 2 and min(g.shape) >= 1, "g", "a shape [..., HV, K] with each of at least 1", g.shape)
    number_or("lower_bound", lower_bound, None)
    given = A_log is not None or lower_bound is not None
    _require(given, "A_log", "an array [HV] for the gate unless lower_bound is given", "None")
    HV, K = g.shape[-2:]
    for name, x, letters, size in (("A_log", A_log, "HV", HV), ("dt_bias", dt_bias, "HV*K", HV * K)):
        if x is not None:
            tensor(name, x, letters, {letters: size})
            _no_wider(name, x, g.dtype)


def sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval):
    """The factor of beta's sigmoid, None where beta comes activated."""
    needed = "use_beta_sigmoid_in_kernel beside it"
    _require(use_beta_sigmoid_in_kernel or not allow_neg_eigval, "allow_neg_eigval", needed, allow_neg_eigval)
    return (2.0 if allow_neg_eigval else 1.0) if use_beta_sigmoid_in_kernel else None


def sequences(cu_seqlens, sizes):
    """`cu_seqlens [N + 1]`: 0 = cu_seqlens[0] <= ... <= cu_seqlens[N] <= T, with B = 1. `sizes` learns N."""
    B, T = sizes["B"], sizes["T"]
    if cu_seqlens is None:
        sizes["N"] = B
        return
    _integers("cu_seqlens", cu_seqlens)
    right = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    _require(right, "cu_seqlens", "a shape [N + 1] with N of at least 1", cu_seqlens.shape)
    _require(B == 1, "cu_seqlens", "a batch of B=1 that holds the packed sequences", f"B={B}")
    if concrete(cu_seqlens):
        ends = np.asarray(cu_seqlens)
        _require(ends[0] == 0, "cu_seqlens", "a first entry of 0", ends[0])
        for n in np.flatnonzero(np.diff(ends) < 0):
            _require(False, "cu_seqlens", "entries that do not decrease", f"{ends[n]}, {ends[n + 1]} at {n}")
        _require(ends[-1] <= T, "cu_seqlens", f"a last entry of at most T={T}", ends[-1])
    sizes["N"] = cu_seqlens.shape[0] - 1


def _require(holds, name, expected, came):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {came}")


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
