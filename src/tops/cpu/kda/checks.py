"""The contract of one argument, and what every error message is made of.

Shapes, dtypes and flags are checked always, values where they are concrete. A message is one line: the
argument's name, what was expected with the actual numbers, what came, and where it is not plain, what to do.
`contracts` has what the arguments of an op must be together.
"""

import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from .chunking import concrete, prepare_chunk_indices

CHUNK_SIZES = (16, 32, 64, 128)
FLOATS = ("float64", "float32", "bfloat16", "float16")
INTEGERS = ("int32", "int64")


def tensor(name, x, letters, sizes):
    """x is a floating array of shape `letters`; `sizes` holds the letters known so far, and learns others."""
    floating(name, x)
    letters = letters.split()
    shape = f"[{', '.join(letters)}]"
    require(x.ndim == len(letters), name, f"a shape {shape}", tuple(x.shape))
    fits = all(sizes.get(letter, size) == size for letter, size in zip(letters, x.shape, strict=True))
    expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    expected = f"{shape} = ({expected}{',' * (len(letters) == 1)})"
    hint = "; are the heads before the tokens?" if not fits and _head_first(letters, x.shape, sizes) else ""
    require(fits, name, expected, f"{tuple(x.shape)}{hint}")
    require(min(x.shape) >= 1, name, f"{shape} with each of at least 1", tuple(x.shape))
    sizes.update(zip(letters, x.shape, strict=True))


def tensors(sizes, **given):
    """`tensor` for each of {name: (x, letters)}."""
    for name, (x, letters) in given.items():
        tensor(name, x, letters, sizes)


def _head_first(letters, shape, sizes):
    """Whether a shape that does not fit would with its heads, or with q's, before the tokens."""
    T, H = sizes.get("T"), sizes.get("H")
    match letters[1:3]:
        case ["T", "H" | "HV"]:
            return shape[1] != T and (shape[2] == T or (shape[2] == H and shape[1] % T == 0))
        case ["HV", "K" | "V"]:  # a state's heads, where all of q, k, v have T heads for H tokens
            return shape[1] == T
    return False


def grouped(name, sizes):
    """Value head h reads q/k head h // (HV / H)."""
    H, HV = sizes["H"], sizes["HV"]
    require(HV % H == 0, name, f"HV a multiple of H={H}", f"HV={HV}")


def states(initial_state, state_v_first, sizes):
    """`initial_state [N, HV, K, V]`, or None."""
    if initial_state is not None:
        tensor("initial_state", initial_state, "N HV V K" if state_v_first else "N HV K V", sizes)


def like(name, x, other, y):
    """x is a floating array of y's shape."""
    floating(name, x)
    require(x.shape == y.shape, name, f"{other}'s shape {tuple(y.shape)}", tuple(x.shape))


def chunk_columns(name, x):
    """x [B, T, HV, C], whose last axis says the chunk size."""
    require(x.shape[-1] in CHUNK_SIZES, name, f"[B, T, HV, C] with C one of {CHUNK_SIZES}", x.shape)


def flags(**given):
    """A flag is a bool: it decides what is compiled, and a misplaced positional argument may end in it."""
    for name, x in given.items():
        if not isinstance(x, bool | np.bool_):
            raise TypeError(f"{name}: expected a bool, got {describe(x)}")


def number_or(name, x, default):
    """A finite number as a float; `default` for None."""
    return default if x is None else number(name, x)


def number(name, x):
    """A finite number as a float."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {describe(x)}")
    try:
        x = float(x)
    except OverflowError:  # an int or a fraction that no float holds
        x = math.inf
    require(math.isfinite(x), name, "a finite number", x)
    return x


def scale_or(x, default):
    """`scale` as a float, `default` for None. A scalar array counts where its value is known."""
    if x is not None and isinstance(x, np.ndarray | jax.Array) and x.shape == ():
        if not concrete(x):
            expected = "a number that is known when jit traces (a static argument)"
            raise TypeError(f"scale: expected {expected}, got a traced {x.dtype}")
        x = x.item()
    return number_or("scale", x, default)


def layout(state_v_first, transpose_state_layout):
    """`state_v_first`, which `transpose_state_layout` was called once."""
    flags(state_v_first=state_v_first)
    if transpose_state_layout is None:
        return state_v_first
    flags(transpose_state_layout=transpose_state_layout)
    require(not state_v_first, "transpose_state_layout", "None beside state_v_first", transpose_state_layout)
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
    if dtype is None:
        return None
    _no_float64(name, jnp.dtype(dtype))
    return jnp.dtype(dtype)


def listed(cu_seqlens):
    """A list of integers as an array; anything else as it is."""
    if not isinstance(cu_seqlens, list) or not all(_is_integer(x) for x in cu_seqlens):
        return cu_seqlens
    return np.asarray(cu_seqlens)


def ends(name, cu_seqlens):
    """`cu_seqlens [N + 1]`: 0 = cu_seqlens[0] <= ... <= cu_seqlens[N]."""
    integers(name, cu_seqlens)
    right = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    require(right, name, "a shape [N + 1] with N of at least 1", cu_seqlens.shape)
    if concrete(cu_seqlens):
        x = np.asarray(cu_seqlens)
        came = f"{x[0]}; give the padding before it a sequence of its own: [0, {x[0]}, ...]"
        require(x[0] == 0, name, "a first entry of 0", came)
        for n in np.flatnonzero(np.diff(x) < 0):
            require(False, name, "entries that do not decrease", f"{x[n]}, {x[n + 1]} at {n}")


def sequences(cu_seqlens, sizes):
    """`cu_seqlens [N + 1]`, with B = 1 and a last entry of at most T, or None. `sizes` learns N."""
    B, T = sizes["B"], sizes["T"]
    if cu_seqlens is None:
        sizes["N"] = B
        return
    ends("cu_seqlens", cu_seqlens)
    require(B == 1, "cu_seqlens", "a batch of B=1 that holds the packed sequences", f"B={B}")
    if concrete(cu_seqlens):
        last = np.asarray(cu_seqlens)[-1]
        require(last <= T, "cu_seqlens", f"a last entry of at most T={T}", last)
    sizes["N"] = cu_seqlens.shape[0] - 1


def known_sequences(cu_seqlens, cu_seqlens_cpu):
    """cu_seqlens, or the copy of it whose values are known where its own are not: `cu_seqlens_cpu`."""
    if cu_seqlens_cpu is None:
        return cu_seqlens
    require(cu_seqlens is not None, "cu_seqlens_cpu", "None without cu_seqlens", describe(cu_seqlens_cpu))
    cu_seqlens_cpu = listed(cu_seqlens_cpu)
    ends("cu_seqlens_cpu", cu_seqlens_cpu)
    expected = f"cu_seqlens's shape {cu_seqlens.shape}"
    require(cu_seqlens_cpu.shape == cu_seqlens.shape, "cu_seqlens_cpu", expected, cu_seqlens_cpu.shape)
    if concrete(cu_seqlens) and concrete(cu_seqlens_cpu):
        _same("cu_seqlens_cpu", cu_seqlens_cpu, cu_seqlens, "the entries of cu_seqlens")
    return cu_seqlens if concrete(cu_seqlens) else cu_seqlens_cpu


def chunks(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_indices [NT, 2]` against what it lists; returns `chunk_size`, a NumPy one as an int."""
    expected = f"one of {CHUNK_SIZES}"
    integer("chunk_size", chunk_size, expected)
    require(chunk_size in CHUNK_SIZES, "chunk_size", expected, chunk_size)
    chunk_list(chunk_size, cu_seqlens, chunk_indices, T)
    return int(chunk_size)


def chunk_list(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_indices [NT, 2]` lists the chunks of cu_seqlens, or is None. Rows (-1, 0) may follow, as in FLA
    with `use_graph`, up to the number that FLA allots."""
    if chunk_indices is None:
        return
    require(cu_seqlens is not None, "chunk_indices", "None without cu_seqlens", describe(chunk_indices))
    integers("chunk_indices", chunk_indices)
    pairs = chunk_indices.ndim == 2 and chunk_indices.shape[1] == 2
    require(pairs, "chunk_indices", "a shape [NT, 2]", chunk_indices.shape)
    NT, most = chunk_indices.shape[0], -(-T // chunk_size) + cu_seqlens.shape[0] - 2
    require(most >= NT, "chunk_indices", f"[NT, 2] with NT of at most {most}", chunk_indices.shape)
    if concrete(cu_seqlens):
        exact = prepare_chunk_indices(cu_seqlens, chunk_size)
        expected = f"the {len(exact)} chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, {chunk_size}))"
        require(len(exact) <= NT, "chunk_indices", expected, f"{NT}")
        if concrete(chunk_indices):
            padding = np.tile([-1, 0], (NT - len(exact), 1))
            same = np.array_equal(np.concatenate([exact, padding]), np.asarray(chunk_indices))
            require(same, "chunk_indices", expected, f"{NT} chunks that differ")


def chunk_offsets(offsets, cu_seqlens, chunk_size):
    """`chunk_offsets [N + 1]`, the first chunk of each sequence of cu_seqlens and their number, or None."""
    if offsets is None:
        return
    require(cu_seqlens is not None, "chunk_offsets", "None without cu_seqlens", describe(offsets))
    integers("chunk_offsets", offsets)
    require(
        offsets.shape == cu_seqlens.shape, "chunk_offsets", f"[N + 1] = {cu_seqlens.shape}", offsets.shape
    )
    if concrete(cu_seqlens) and concrete(offsets):
        counts = -(-np.diff(np.asarray(cu_seqlens)) // chunk_size)
        expected = f"those of cu_seqlens (prepare_chunk_offsets(cu_seqlens, {chunk_size}))"
        _same("chunk_offsets", offsets, np.cumsum([0, *counts]), expected)


def graph(use_graph, cu_seqlens, max_num_seqs=None):
    """FLA's arguments for a launch that is replayed with other values of cu_seqlens, as `jit` does anyway."""
    flags(use_graph=use_graph)
    if max_num_seqs is not None:
        at_least_one("max_num_seqs", max_num_seqs)
    if use_graph and max_num_seqs is not None and cu_seqlens is not None:
        cu_seqlens = listed(cu_seqlens)
        ends("cu_seqlens", cu_seqlens)
        N = cu_seqlens.shape[0] - 1
        came = f"{max_num_seqs}; repeat the last entry of cu_seqlens until there are as many"
        require(max_num_seqs == N, "max_num_seqs", f"the N={N} sequences of cu_seqlens", came)


def no_context(cp_context):
    """FLA's context of a process group: here the mesh is named in the call."""
    if cp_context is not None:
        came = f"{describe(cp_context)}; call context_parallel_kda with a mesh"
        raise TypeError(f"cp_context: expected None, got {came}")


def at_least_one(name, x):
    integer(name, x, "an integer")
    require(x >= 1, name, "at least 1", x)


def _same(name, x, other, expected):
    """Two integer arrays of one shape, whose values are known, are equal."""
    x, other = np.asarray(x), np.asarray(other)
    for n in np.flatnonzero(x != other):
        require(False, name, expected, f"{x[n]} for {other[n]} at {n}")


def _is_integer(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def integer(name, x, expected):
    if not _is_integer(x):
        raise TypeError(f"{name}: expected {expected}, got {describe(x)}")


def require(holds, name, expected, came):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {came}")


def _array(name, x, dtypes):
    kind = "an array of " + ", ".join(dtypes)
    if not isinstance(x, (np.ndarray, jax.Array)):
        raise TypeError(f"{name}: expected {kind}, got {describe(x)}")
    if str(x.dtype) not in dtypes:  # str: the name of a dtype hides its byte order
        raise TypeError(f"{name}: expected {kind}, got {describe(x)}")


def floating(name, x):
    _array(name, x, FLOATS)
    _no_float64(name, x.dtype)


def integers(name, x):
    """No unsigned ones: their differences wrap around. No short ones: T may not fit."""
    _array(name, x, INTEGERS)


def _no_float64(name, dtype):
    """JAX would cast it down without a word."""
    if dtype == np.float64 and not jax.config.jax_enable_x64:  # ty: ignore[missing-attribute]
        raise TypeError(f"{name}: expected float32 or less while jax_enable_x64 is off, got float64")


def no_wider(name, x, other, dtype):
    """Arithmetic is in promote_types(dtype of other, float32): a wider operand would be cast down."""
    if x.dtype == dtype:
        return
    accumulator = jnp.promote_types(dtype, jnp.float32)
    if jnp.promote_types(x.dtype, accumulator) != accumulator:
        raise TypeError(f"{name}: expected at most {accumulator}, as {other} is {dtype}, got {x.dtype}")


def describe(x):
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray | jax.Array) else type(x).__name__
