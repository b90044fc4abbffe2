"""The argument contracts: every error message of the package.

Shapes, dtypes and flags are checked always, values where they are concrete. A message is one line: the
argument's name, what was expected with the actual numbers, what came, and where it is not plain, what to do.
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


def forward(
    q, k, v, g, beta, scale, initial_state, state_v_first=False, cu_seqlens=None, headwise_beta=False
):
    """The contract that every forward op shares; returns the scale, K ** -0.5 for None. With `headwise_beta`,
    beta may have an axis V."""
    sizes = {}
    tensor("q", q, "B T H K", sizes)
    tensor("k", k, "B T H K", sizes)
    tensor("v", v, "B T HV V", sizes)
    grouped("v", sizes)
    tensor("g", g, "B T HV K", sizes)
    headwise_beta = headwise_beta and getattr(beta, "ndim", 3) == 4
    tensor("beta", beta, "B T HV V" if headwise_beta else "B T HV", sizes)
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
    for name, x in dict(v=v, g=g, beta=beta).items():
        _no_wider(name, x, "q", q.dtype)
    sequences(cu_seqlens, sizes)
    states(initial_state, state_v_first, sizes)
    if initial_state is not None:
        _no_wider("initial_state", initial_state, "q", q.dtype)
    return scale_or(scale, sizes["K"] ** -0.5)


def oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """The contract of `naive_recurrent_kda`; returns the arguments that it is to get in another form."""
    flags(output_final_state=output_final_state)
    cu_seqlens = listed(cu_seqlens)
    if isinstance(initial_state, np.ndarray | jax.Array) and initial_state.ndim == 3:  # of one sequence
        initial_state = initial_state[None]
    scale = forward(q, k, v, g, beta, scale, initial_state, cu_seqlens=cu_seqlens)
    return dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def oracle_in_chunks(q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size, cu_seqlens):
    """The contract of `naive_chunk_kda`; returns what `oracle` does."""
    at_least_one("chunk_size", chunk_size)
    return oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def tensor(name, x, letters, sizes):
    """x is a floating array of shape `letters`; `sizes` holds the letters known so far, and learns others."""
    _floating(name, x)
    letters = letters.split()
    shape = f"[{', '.join(letters)}]"
    _require(x.ndim == len(letters), name, f"a shape {shape}", tuple(x.shape))
    fits = all(sizes.get(letter, size) == size for letter, size in zip(letters, x.shape, strict=True))
    expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    expected = f"{shape} = ({expected}{',' * (len(letters) == 1)})"
    hint = "; are the heads before the tokens?" if not fits and _head_first(letters, x.shape, sizes) else ""
    _require(fits, name, expected, f"{tuple(x.shape)}{hint}")
    _require(min(x.shape) >= 1, name, f"{shape} with each of at least 1", tuple(x.shape))
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


def scale_or(x, default):
    """`scale` as a float, `default` for None. A scalar array counts where its value is known."""
    if x is not None and isinstance(x, np.ndarray | jax.Array) and x.shape == ():
        if not concrete(x):
            expected = "a number that is known when jit traces (a static argument)"
            raise TypeError(f"scale: expected {expected}, got a traced {x.dtype}")
        x = x.item()
    return number_or("scale", x, default)


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
    """`op` behind `contract`, which takes some of its arguments and may return some in another form: for
    modules that do not import this one."""
    signature = inspect.signature(op)
    names = inspect.signature(contract).parameters

    @functools.wraps(op)
    def checked(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        given = {name: x for name, x in arguments.arguments.items() if name in names}
        arguments.arguments |= contract(**given)
        return op(*arguments.args, **arguments.kwargs)

    return checked


def chunk_columns(name, x):
    """x [B, T, HV, C], whose last axis says the chunk size."""
    _require(x.shape[-1] in CHUNK_SIZES, name, f"[B, T, HV, C] with C one of {CHUNK_SIZES}", x.shape)


def chunks(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_indices [NT, 2]` against what it lists; returns `chunk_size`, a NumPy one as an int."""
    expected = f"one of {CHUNK_SIZES}"
    _integer("chunk_size", chunk_size, expected)
    _require(chunk_size in CHUNK_SIZES, "chunk_size", expected, chunk_size)
    chunk_list(chunk_size, cu_seqlens, chunk_indices, T)
    return int(chunk_size)


def chunk_list(chunk_size, cu_seqlens, chunk_indices, T):
    """`chunk_indices [NT, 2]` lists the chunks of cu_seqlens, or is None."""
    if chunk_indices is None:
        return
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


def chunk_offsets(offsets, cu_seqlens, chunk_size):
    """`chunk_offsets [N + 1]`, the first chunk of each sequence of cu_seqlens and their number, or None."""
    if offsets is None:
        return
    _require(cu_seqlens is not None, "chunk_offsets", "None without cu_seqlens", _describe(offsets))
    _integers("chunk_offsets", offsets)
    _require(
        offsets.shape == cu_seqlens.shape, "chunk_offsets", f"[N + 1] = {cu_seqlens.shape}", offsets.shape
    )
    if concrete(cu_seqlens) and concrete(offsets):
        counts = -(-np.diff(np.asarray(cu_seqlens)) // chunk_size)
        expected = f"those of cu_seqlens (prepare_chunk_offsets(cu_seqlens, {chunk_size}))"
        _same("chunk_offsets", offsets, np.cumsum([0, *counts]), expected)


def stage(sizes, chunk_size, cu_seqlens, chunk_indices, use_graph, offsets=None):
    """What every stage op of the backward takes beside its tensors; `sizes` learns N, C and NT.

    Returns cu_seqlens as an array, chunk_size, and NT, exact where it is known.
    """
    cu_seqlens = listed(cu_seqlens)
    graph(use_graph, cu_seqlens)
    sequences(cu_seqlens, sizes)
    sizes["C"] = chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    chunk_offsets(offsets, cu_seqlens, sizes["C"])
    sizes["NT"] = exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, sizes["C"])
    return cu_seqlens, sizes["C"], sizes["NT"]


def backward(
    q, k, v, beta, Aqk, Akk, initial_state, do, dht, g, g_org, state_v_first, use_gate_in_kernel,
    chunk_size, cu_seqlens, chunk_indices, chunk_offsets, use_graph, saved,
):  # fmt: skip
    """The contract of `chunk_kda_bwd`; `saved` is what it does not make again. Returns what `stage` does."""
    flags(use_gate_in_kernel=use_gate_in_kernel)
    sizes = {}
    tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    grouped("v", sizes)
    packing = stage(sizes, chunk_size, cu_seqlens, chunk_indices, use_graph, chunk_offsets)
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
    return packing


def cumsum(g, letters, chunk_size, scale, cu_seqlens, chunk_indices):
    """The contract of the chunk-local cumulative sums; returns chunk_size and the scale, 1 for None."""
    sizes = {}
    tensor("g", g, letters, sizes)
    sequences(cu_seqlens, sizes)
    expected = "a power of two of at least 8"
    _integer("chunk_size", chunk_size, expected)
    _require(chunk_size >= 8 and chunk_size & (chunk_size - 1) == 0, "chunk_size", expected, chunk_size)
    chunk_list(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    return int(chunk_size), scale_or(scale, 1.0)


def safe_gate(safe, lower_bound, needed=False):
    """FLA's rules for `safe_gate`: with it, `lower_bound` lies in [-5, 0); it must be given if `needed`."""
    flags(safe_gate=safe)
    number_or("lower_bound", lower_bound, None)
    if safe and (needed or lower_bound is not None):
        in_range = lower_bound is not None and -5 <= lower_bound < 0
        _require(in_range, "lower_bound", "a number in [-5, 0) with safe_gate", lower_bound)


def gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe, g):
    """The options of the in-kernel gate, for g [B, T, HV, K].

    Returns A_log [HV] and dt_bias [HV * K], None where not given. Without `use_gate_in_kernel` both are None:
    FLA takes them there too, and does not read them.
    """
    flags(use_gate_in_kernel=use_gate_in_kernel)
    safe_gate(safe, lower_bound, needed=use_gate_in_kernel)
    if use_gate_in_kernel:
        return raw_gate(g, A_log, dt_bias, lower_bound)
    _gate_parameters(g, A_log, dt_bias)
    return None, None


def raw_gate(g, A_log, dt_bias, lower_bound):
    """A gate activation's arguments, for g [..., HV, K]; returns A_log [HV] and dt_bias [HV * K] or None."""
    _floating("g", g)
    _require(g.ndim >= 2 and min(g.shape) >= 1, "g", "a shape [..., HV, K] with each of at least 1", g.shape)
    number_or("lower_bound", lower_bound, None)
    given = A_log is not None or lower_bound is not None
    _require(given, "A_log", "an array [HV] for the gate unless lower_bound is given", "None")
    return _gate_parameters(g, A_log, dt_bias)


def _gate_parameters(g, A_log, dt_bias):
    """A_log [HV], which checkpoints hold as [1, 1, HV, 1], and dt_bias [HV * K], also as [HV, K]."""
    HV, K = g.shape[-2:]
    A_log = _flat("A_log", A_log, {"[HV]": (HV,), "[1, 1, HV, 1]": (1, 1, HV, 1)}, g)
    return A_log, _flat("dt_bias", dt_bias, {"[HV*K]": (HV * K,), "[HV, K]": (HV, K)}, g)


def _flat(name, x, shapes, g):
    """x in one of the shapes {letters: shape} as an array of one axis, or None."""
    if x is None:
        return None
    _floating(name, x)
    expected = " or ".join(f"{letters} = {shape}" for letters, shape in shapes.items())
    size = math.prod(next(iter(shapes.values())))
    came = f"{x.shape}; of a padded one, take the first {size}" if x.size > size else x.shape
    _require(x.shape in shapes.values(), name, expected, came)
    _no_wider(name, x, "g", g.dtype)
    return x if x.ndim == 1 else x.reshape(-1)


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


def listed(cu_seqlens):
    """A list of integers as an array; anything else as it is."""
    if not isinstance(cu_seqlens, list) or not all(_is_integer(x) for x in cu_seqlens):
        return cu_seqlens
    return np.asarray(cu_seqlens)


def sequences(cu_seqlens, sizes):
    """`cu_seqlens [N + 1]`, with B = 1 and a last entry of at most T, or None. `sizes` learns N."""
    B, T = sizes["B"], sizes["T"]
    if cu_seqlens is None:
        sizes["N"] = B
        return
    ends("cu_seqlens", cu_seqlens)
    _require(B == 1, "cu_seqlens", "a batch of B=1 that holds the packed sequences", f"B={B}")
    if concrete(cu_seqlens):
        last = np.asarray(cu_seqlens)[-1]
        _require(last <= T, "cu_seqlens", f"a last entry of at most T={T}", last)
    sizes["N"] = cu_seqlens.shape[0] - 1


def known_sequences(cu_seqlens, cu_seqlens_cpu):
    """cu_seqlens, or the copy of it whose values are known where its own are not: `cu_seqlens_cpu`."""
    if cu_seqlens_cpu is None:
        return cu_seqlens
    _require(cu_seqlens is not None, "cu_seqlens_cpu", "None without cu_seqlens", _describe(cu_seqlens_cpu))
    cu_seqlens_cpu = listed(cu_seqlens_cpu)
    ends("cu_seqlens_cpu", cu_seqlens_cpu)
    expected = f"cu_seqlens's shape {cu_seqlens.shape}"
    _require(cu_seqlens_cpu.shape == cu_seqlens.shape, "cu_seqlens_cpu", expected, cu_seqlens_cpu.shape)
    if concrete(cu_seqlens) and concrete(cu_seqlens_cpu):
        _same("cu_seqlens_cpu", cu_seqlens_cpu, cu_seqlens, "the entries of cu_seqlens")
    return cu_seqlens if concrete(cu_seqlens) else cu_seqlens_cpu


def pool(
    v, k, initial_state, state_v_first, cu_seqlens, ssm_state_indices, num_accepted_tokens,
    inplace_final_state, out,
):  # fmt: skip
    """The states of `fused_recurrent_kda_fwd`, for inputs that have been checked."""
    if out is not None:
        raise TypeError(f"out: expected None, got {_describe(out)}; the output is returned")
    indices, accepted = ssm_state_indices, num_accepted_tokens
    if indices is None:
        came = "None; pass inplace_final_state=False"
        given = initial_state is not None or not inplace_final_state
        _require(given, "initial_state", "states [N, HV, K, V] with inplace_final_state", came)
        came = _describe(accepted)
        _require(accepted is None, "num_accepted_tokens", "None without ssm_state_indices", came)
        return
    B, T, HV, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _integers("ssm_state_indices", indices)
    right = indices.ndim in (1, 2) and indices.shape[0] == N and min(indices.shape) >= 1
    _require(right, "ssm_state_indices", f"a shape [N] or [N, M] with N={N}", indices.shape)
    _require(initial_state is not None, "initial_state", "the pool [P, HV, K, V] of the indices", "None")
    letters = "P HV V K" if state_v_first else "P HV K V"
    tensor("initial_state", initial_state, letters, dict(HV=HV, V=V, K=k.shape[-1]))
    P, M = initial_state.shape[0], 1 if indices.ndim == 1 else indices.shape[1]
    longest = T
    if cu_seqlens is not None:
        longest = int(np.diff(np.asarray(cu_seqlens)).max()) if concrete(cu_seqlens) else 0
    fits = longest <= M or not inplace_final_state
    _require(fits, "ssm_state_indices", f"[N, M] with a slot for each of {longest} tokens", indices.shape)
    if concrete(indices):
        most = int(np.asarray(indices).max())
        _require(most < P, "ssm_state_indices", f"indices below P={P}", most)
    if accepted is not None:
        _integers("num_accepted_tokens", accepted)
        _require(accepted.shape == (N,), "num_accepted_tokens", f"[N] = ({N},)", accepted.shape)
        if concrete(accepted):
            for x in np.asarray(accepted):
                _require(x in range(1, M + 1), "num_accepted_tokens", f"numbers from 1 to M={M}", x)


def ends(name, cu_seqlens):
    """`cu_seqlens [N + 1]`: 0 = cu_seqlens[0] <= ... <= cu_seqlens[N]."""
    _integers(name, cu_seqlens)
    right = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 2
    _require(right, name, "a shape [N + 1] with N of at least 1", cu_seqlens.shape)
    if concrete(cu_seqlens):
        x = np.asarray(cu_seqlens)
        came = f"{x[0]}; give the padding before it a sequence of its own: [0, {x[0]}, ...]"
        _require(x[0] == 0, name, "a first entry of 0", came)
        for n in np.flatnonzero(np.diff(x) < 0):
            _require(False, name, "entries that do not decrease", f"{x[n]}, {x[n + 1]} at {n}")


def index_helper(cu_seqlens, chunk_size=1):
    """The contract of `prepare_lens` and `prepare_chunk_offsets`; returns cu_seqlens as an array."""
    cu_seqlens = listed(cu_seqlens)
    ends("cu_seqlens", cu_seqlens)
    at_least_one("chunk_size", chunk_size)
    return dict(cu_seqlens=cu_seqlens)


def at_least_one(name, x):
    _integer(name, x, "an integer")
    _require(x >= 1, name, "at least 1", x)


def known_index_helper(cu_seqlens, chunk_size, cu_seqlens_cpu):
    """The contract of `prepare_chunk_indices`, whose number of rows follows from the values of cu_seqlens."""
    taken = index_helper(cu_seqlens, chunk_size)
    cu_seqlens_cpu = listed(cu_seqlens_cpu)
    if not concrete(known_sequences(taken["cu_seqlens"], cu_seqlens_cpu)):
        raise TypeError("cu_seqlens: expected values that are known (not under jit), got a traced array")
    return taken | dict(cu_seqlens_cpu=cu_seqlens_cpu)


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
        _require(max_num_seqs == N, "max_num_seqs", f"the N={N} sequences of cu_seqlens", came)


def no_context(cp_context):
    """FLA's context of a process group: here the mesh is named in the call."""
    if cp_context is not None:
        came = f"{_describe(cp_context)}; call context_parallel_kda with a mesh"
        raise TypeError(f"cp_context: expected None, got {came}")


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


def _same(name, x, other, expected):
    """Two integer arrays of one shape, whose values are known, are equal."""
    x, other = np.asarray(x), np.asarray(other)
    for n in np.flatnonzero(x != other):
        _require(False, name, expected, f"{x[n]} for {other[n]} at {n}")


def _is_integer(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _integer(name, x, expected):
    if not _is_integer(x):
        raise TypeError(f"{name}: expected {expected}, got {_describe(x)}")


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
    if x.dtype == dtype:
        return
    accumulator = jnp.promote_types(dtype, jnp.float32)
    if jnp.promote_types(x.dtype, accumulator) != accumulator:
        raise TypeError(f"{name}: expected at most {accumulator}, as {other} is {dtype}, got {x.dtype}")


def _describe(x):
    return f"an array of {x.dtype}" if isinstance(x, np.ndarray | jax.Array) else type(x).__name__
