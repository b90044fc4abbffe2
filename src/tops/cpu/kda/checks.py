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

from .chunking import concrete, exact_num_chunks, max_num_chunks, prepare_chunk_indices

CHUNK_SIZES = (16, 32, 64, 128)
FLOATS = ("float64", "float32", "bfloat16", "float16")
INTEGERS = ("int32", "int64")


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
        _no_wider(name, x, "q", q.dtype)
    sequences(cu_seqlens, sizes)
    states(initial_state, state_v_first, sizes)
    if initial_state is not None:
        _no_wider("initial_state", initial_state, "q", q.dtype)
    return number_or("scale", scale, sizes["K"] ** -0.5)


def oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """The contract of `naive_recurrent_kda`."""
    flags(output_final_state=output_final_state)
    forward(q, k, v, g, beta, scale, initial_state, cu_seqlens=cu_seqlens)


def oracle_in_chunks(q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size, cu_seqlens):
    """The contract of `naive_chunk_kda`."""
    oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)
    at_least_one("chunk_size", chunk_size)


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


def tensors(sizes, **given):
    """`tensor` for each of {name: (x, letters)}."""
    for name, (x, letters) in given.items():
        tensor(name, x, letters, sizes)


def grouped(name, sizes):
    """Value head h reads q/k head h // (HV / H)."""
    H, HV = sizes["H"], sizes["HV"]
    _require(HV % H == 0, name, f"HV a multiple of H={H}", f"HV={HV}")


def states(initial_state, state_v_first, sizes):
    """`initial_state [N, HV, K, V]`, or None."""
    if initial_state is not None:
        tensor("initial_state", initial_state, "N HV V K" if state_v_first else "N HV K V", sizes)


def flags(**given):
    """A flag is a bool: it decides what is compiled, and a misplaced positional argument may end in it."""
    for name, x in given.items():
        if not isinstance(x, bool | np.bool_):
            raise TypeError(f"{name}: expected a bool, got {_describe(x)}")


def number_or(name, x, default):
    """A finite number as a float; `default` for None."""
    return default if x is None else number(name, x)


def number(name, x):
    """A finite number as a float."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {_describe(x)}")
    try:
        x = float(x)
    except OverflowError:  # an int or a fraction that no float holds
        x = math.inf
    _require(math.isfinite(x), name, "a finite number", x)
    return x


def layout(state_v_first, transpose_state_layout):
    """`state_v_first`, which `transpose_state_layout` was called once."""
    flags(state_v_first=state_v_first)
    if transpose_state_layout is None:
        return state_v_first
    flags(transpose_state_layout=transpose_state_layout)
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
    if dtype is None:
        return None
    _no_float64(name, jnp.dtype(dtype))
    return jnp.dtype(dtype)


def guarded(op, contract):
    """`op` behind `contract`, which takes some of its arguments: for modules that do not import this one."""
    signature = inspect.signature(op)
    names = inspect.signature(contract).parameters

    @functools.wraps(op)
    def checked(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        contract(**{name: x for name, x in arguments.arguments.items() if name in names})
        return op(*args, **kwargs)

    return checked


def chunk_columns(name, x):
    """x [B, T, HV, C], whose last axis says the chunk size."""
    _require(x.shape[-1] in CHUNK_SIZES, name, f"[B, T, HV, C] with C one of {CHUNK_SIZES}", x.shape)


def chunks(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_indices [NT, 2]` against what it lists; returns `chunk_size`, a NumPy one as an int."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):
        raise TypeError(f"chunk_size: expected one of {CHUNK_SIZES}, got {_describe(chunk_size)}")
    _require(chunk_size in CHUNK_SIZES, "chunk_size", f"one of {CHUNK_SIZES}", chunk_size)
    chunk_size = int(chunk_size)
    if chunk_indices is None:
        return chunk_size
    _require(cu_seqlens is not None, "chunk_indices", "None without cu_seqlens", _describe(chunk_indices))
    _integers("chunk_indices", chunk_indices)
    pairs = chunk_indices.ndim == 2 and chunk_indices.shape[1] == 2
    _require(pairs, "chunk_indices", "a shape [NT, 2]", chunk_indices.shape)
    NT, most = chunk_indices.shape[0], max_num_chunks(T, cu_seqlens.shape[0] - 1, chunk_size)
    _require(most >= NT, "chunk_indices", f"[NT, 2] with NT of at most {most}", chunk_indices.shape)
    if concrete(cu_seqlens):
        exact = prepare_chunk_indices(cu_seqlens, chunk_size)
        expected = f"the {len(exact)} chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, {chunk_size}))"
        _require(len(exact) == NT, "chunk_indices", expected, f"{NT}")
        if concrete(chunk_indices):
            same = np.array_equal(exact, np.asarray(chunk_indices))
            _require(same, "chunk_indices", expected, f"{NT} chunks that differ")
    return chunk_size


def stage(sizes, chunk_size, cu_seqlens, chunk_indices):
    """What every stage op of the backward takes beside its tensors; returns chunk_size, and NT as it is exact
    where it is known. `sizes` learns N, C and NT."""
    sequences(cu_seqlens, sizes)
    sizes["C"] = chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    sizes["NT"] = exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, sizes["C"])
    return sizes["C"], sizes["NT"]


def backward(
    q, k, v, beta, Aqk, Akk, initial_state, do, dht, g, g_org, state_v_first, use_gate_in_kernel,
    chunk_size, cu_seqlens, chunk_indices, saved,
):  # fmt: skip
    """The contract of `chunk_kda_bwd`; `saved` is what it does not make again."""
    flags(use_gate_in_kernel=use_gate_in_kernel)
    sizes = {}
    tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    grouped("v", sizes)
    stage(sizes, chunk_size, cu_seqlens, chunk_indices)
    state = "HV V K" if state_v_first else "HV K V"
    needed = dict(beta=(beta, "B T HV"), Aqk=(Aqk, "B T HV C"), Akk=(Akk, "B T HV C"), do=(do, "B T HV V"))
    optional = dict(initial_state=(initial_state, f"N {state}"), dht=(dht, f"N {state}"))
    optional |= dict(g=(g, "B T HV K"), g_org=(g_org, "B T HV K"))
    letters = dict.fromkeys(("w", "qg", "kg"), "B T HV K") | dict(v_new="B T HV V", h=f"B NT {state}")
    for name, x in saved.items():
        _require(x is not None, name, f"the forward's {name} with disable_recompute", "None")
        needed[name] = x, letters[name]
    tensors(sizes, **needed, **{name: given for name, given in optional.items() if given[0] is not None})
    has_g = g is not None or (use_gate_in_kernel and not saved)
    _require(has_g, "g", "the forward's cumulative sums of the log decays", "None")
    raw = "the raw gates with use_gate_in_kernel" if use_gate_in_kernel else "None without use_gate_in_kernel"
    came = "None" if g_org is None else _describe(g_org)
    _require((g_org is not None) == use_gate_in_kernel, "g_org", raw, came)


def cumsum(g, letters, chunk_size, scale, cu_seqlens, chunk_indices):
    """The contract of the chunk-local cumulative sums; returns chunk_size and the scale, 1 for None."""
    sizes = {}
    tensor("g", g, letters, sizes)
    sequences(cu_seqlens, sizes)
    chunk_size = chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    return chunk_size, number_or("scale", scale, 1.0)


def safe_gate(safe, lower_bound, needed=False):
    """FLA's rules for `safe_gate`: with it, `lower_bound` lies in [-5, 0); it must be given if `needed`."""
    flags(safe_gate=safe)
    number_or("lower_bound", lower_bound, None)
    if safe and (needed or lower_bound is not None):
        in_range = lower_bound is not None and -5 <= lower_bound < 0
        _require(in_range, "lower_bound", "a number in [-5, 0) with safe_gate", lower_bound)


def gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe, g):
    """The options of the in-kernel gate, for g [B, T, HV, K]."""
    flags(use_gate_in_kernel=use_gate_in_kernel)
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
            _no_wider(name, x, "g", g.dtype)


def like(name, x, other, y):
    """x is a floating array of y's shape."""
    _floating(name, x)
    _require(x.shape == y.shape, name, f"{other}'s shape {tuple(y.shape)}", tuple(x.shape))


def sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval):
    """The factor of beta's sigmoid, None where beta comes activated."""
    flags(use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    needed = "use_beta_sigmoid_in_kernel beside it"
    _require(use_beta_sigmoid_in_kernel or not allow_neg_eigval, "allow_neg_eigval", needed, allow_neg_eigval)
    return (2.0 if allow_neg_eigval else 1.0) if use_beta_sigmoid_in_kernel else None


def sequences(cu_seqlens, sizes):
    """`cu_seqlens [N + 1]`, with B = 1 and a last entry of at most T, or None. `sizes` learns N."""
    B, T = sizes["B"], sizes["T"]
    if cu_seqlens is None:
        sizes["N"] = B
        return
    ends(cu_seqlens)
    _require(B == 1, "cu_seqlens", "a batch of B=1 that holds the packed sequences", f"B={B}")
    if concrete(cu_seqlens):
        last = np.asarray(cu_seqlens)[-1]
        _require(last <= T, "cu_seqlens", f"a last entry of at most T={T}", last)
    sizes["N"] = cu_seqlens.shape[0] - 1


def ends(cu_seqlens):
    """`cu_seqlens [N + 1]`: 0 = cu_seqlens[0] <= ... <= cu_seqlens[N]."""
    _integers("cu_seqlens", cu_seqlens)
    right = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    _require(right, "cu_seqlens", "a shape [N + 1] with N of at least 1", cu_seqlens.shape)
    if concrete(cu_seqlens):
        x = np.asarray(cu_seqlens)
        _require(x[0] == 0, "cu_seqlens", "a first entry of 0", x[0])
        for n in np.flatnonzero(np.diff(x) < 0):
            _require(False, "cu_seqlens", "entries that do not decrease", f"{x[n]}, {x[n + 1]} at {n}")


def index_helper(cu_seqlens, chunk_size=1):
    """The contract of `prepare_lens` and `prepare_chunk_offsets`."""
    ends(cu_seqlens)
    at_least_one("chunk_size", chunk_size)


def at_least_one(name, x):
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {_describe(x)}")
    _require(x >= 1, name, "at least 1", x)


def known_index_helper(cu_seqlens, chunk_size):
    """The contract of `prepare_chunk_indices`, whose number of rows follows from the values of cu_seqlens."""
    index_helper(cu_seqlens, chunk_size)
    if not concrete(cu_seqlens):
        raise TypeError("cu_seqlens: expected values that are known (not under jit), got a traced array")


def mesh_axes(mesh, axes, sizes):
    """`axes`: {argument: (axis of `mesh` or None, letter of `sizes`)}; its devices divide that size."""
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {_describe(mesh)}")
    taken = set()
    for name, (axis, letter) in axes.items():
        if axis is None:
            continue
        _require(axis in mesh.axis_names, name, f"an axis of the mesh, one of {mesh.axis_names}", repr(axis))
        _require(axis not in taken, name, "an axis that nothing else is sharded over", repr(axis))
        taken.add(axis)
        devices = f"{mesh.shape[axis]} devices of mesh axis {axis!r}"
        size = sizes[letter]
        _require(
            size % mesh.shape[axis] == 0, "q", f"{letter} a multiple of the {devices}", f"{letter}={size}"
        )


def _require(holds, name, expected, came):
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {came}")


def _array(name, x, dtypes):
    kind = "an array of " + ", ".join(dtypes)
    if not isinstance(x, (np.ndarray, jax.Array)):
        raise TypeError(f"{name}: expected {kind}, got {_describe(x)}")
    if str(x.dtype) not in dtypes:  # str: the name of a dtype hides its byte order
        raise TypeError(f"{name}: expected {kind}, got {_describe(x)}")


def _floating(name, x):
    _array(name, x, FLOATS)
    _no_float64(name, x.dtype)


def _integers(name, x):
    """No unsigned ones: their differences wrap around. No short ones: T may not fit."""
    _array(name, x, INTEGERS)


def _no_float64(name, dtype):
    """JAX would cast it down without a word."""
    if dtype == np.float64 and not jax.config.jax_enable_x64:
        raise TypeError(f"{name}: expected float32 or less while jax_enable_x64 is off, got float64")


def _no_wider(name, x, other, dtype):
    """Arithmetic is in promote_types(dtype of other, float32): a wider operand would be cast down."""
    accumulator = jnp.promote_types(dtype, jnp.float32)
    if jnp.promote_types(x.dtype, accumulator) != accumulator:
        raise TypeError(f"{name}: expected at most {accumulator}, as {other} is {dtype}, got {x.dtype}")


def _describe(x):
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray | jax.Array) else type(x).__name__
