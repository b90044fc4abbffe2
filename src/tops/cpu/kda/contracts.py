"""The contract of a whole op: what its arguments must be together. `checks` makes the messages.

A contract that returns something returns arguments in the form that the op computes with.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from . import checks
from .chunking import concrete, exact_num_chunks

Op = TypeVar("Op", bound=Callable)


def guarded(op: Op, contract: Callable) -> Op:
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

    return checked  # ty: ignore[invalid-explicit-return]  # of op's signature, as the first lines make it


def forward(
    q, k, v, g, beta, scale, initial_state, state_v_first=False, cu_seqlens=None, headwise_beta=False
):
    """The contract that every forward op shares; returns the scale, K ** -0.5 for None. With `headwise_beta`,
    beta may have an axis V."""
    sizes = {}
    checks.tensor("q", q, "B T H K", sizes)
    checks.tensor("k", k, "B T H K", sizes)
    checks.tensor("v", v, "B T HV V", sizes)
    checks.grouped("v", sizes)
    checks.tensor("g", g, "B T HV K", sizes)
    headwise_beta = headwise_beta and getattr(beta, "ndim", 3) == 4
    checks.tensor("beta", beta, "B T HV V" if headwise_beta else "B T HV", sizes)
    if k.dtype != q.dtype:
        raise TypeError(f"k: expected q's dtype {q.dtype}, got {k.dtype}")
    for name, x in dict(v=v, g=g, beta=beta).items():
        checks.no_wider(name, x, "q", q.dtype)
    checks.sequences(cu_seqlens, sizes)
    checks.states(initial_state, state_v_first, sizes)
    if initial_state is not None:
        checks.no_wider("initial_state", initial_state, "q", q.dtype)
    return checks.scale_or(scale, sizes["K"] ** -0.5)


def oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """The contract of `naive_recurrent_kda`; returns the arguments that it is to get in another form."""
    checks.flags(output_final_state=output_final_state)
    cu_seqlens = checks.listed(cu_seqlens)
    if isinstance(initial_state, np.ndarray | jax.Array) and initial_state.ndim == 3:  # of one sequence
        initial_state = initial_state[None]
    scale = forward(q, k, v, g, beta, scale, initial_state, cu_seqlens=cu_seqlens)
    return dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def oracle_in_chunks(q, k, v, g, beta, scale, initial_state, output_final_state, chunk_size, cu_seqlens):
    """The contract of `naive_chunk_kda`; returns what `oracle` does."""
    checks.at_least_one("chunk_size", chunk_size)
    return oracle(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)


def stage(sizes, chunk_size, cu_seqlens, chunk_indices, use_graph, offsets=None):
    """What every stage op of the backward takes beside its tensors; `sizes` learns N, C and NT.

    Returns cu_seqlens as an array, chunk_size, and NT, exact where it is known.
    """
    cu_seqlens = checks.listed(cu_seqlens)
    checks.graph(use_graph, cu_seqlens)
    checks.sequences(cu_seqlens, sizes)
    sizes["C"] = checks.chunks(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    checks.chunk_offsets(offsets, cu_seqlens, sizes["C"])
    sizes["NT"] = exact_num_chunks(sizes["T"], cu_seqlens, chunk_indices, sizes["C"])
    return cu_seqlens, sizes["C"], sizes["NT"]


def backward(
    q, k, v, beta, Aqk, Akk, initial_state, do, dht, g, g_org, state_v_first, use_gate_in_kernel,
    chunk_size, cu_seqlens, chunk_indices, chunk_offsets, use_graph, saved,
):  # fmt: skip
    """The contract of `chunk_kda_bwd`; `saved` is what it does not make again. Returns what `stage` does."""
    checks.flags(use_gate_in_kernel=use_gate_in_kernel)
    sizes = {}
    checks.tensors(sizes, q=(q, "B T H K"), k=(k, "B T H K"), v=(v, "B T HV V"))
    checks.grouped("v", sizes)
    packing = stage(sizes, chunk_size, cu_seqlens, chunk_indices, use_graph, chunk_offsets)
    state = "HV V K" if state_v_first else "HV K V"
    needed = dict(beta=(beta, "B T HV"), Aqk=(Aqk, "B T HV C"), Akk=(Akk, "B T HV C"), do=(do, "B T HV V"))
    optional = dict(initial_state=(initial_state, f"N {state}"), dht=(dht, f"N {state}"))
    optional |= dict(g=(g, "B T HV K"), g_org=(g_org, "B T HV K"))
    letters = dict.fromkeys(("w", "qg", "kg"), "B T HV K") | dict(v_new="B T HV V", h=f"B NT {state}")
    for name, x in saved.items():
        checks.require(x is not None, name, f"the forward's {name} with disable_recompute", "None")
        needed[name] = x, letters[name]
    checks.tensors(
        sizes, **needed, **{name: given for name, given in optional.items() if given[0] is not None}
    )
    has_g = g is not None or (use_gate_in_kernel and not saved)
    checks.require(has_g, "g", "the forward's cumulative sums of the log decays", "None")
    raw = "the raw gates with use_gate_in_kernel" if use_gate_in_kernel else "None without use_gate_in_kernel"
    came = "None" if g_org is None else checks.describe(g_org)
    checks.require((g_org is not None) == use_gate_in_kernel, "g_org", raw, came)
    return packing


def cumsum(g, letters, chunk_size, scale, cu_seqlens, chunk_indices):
    """The contract of the chunk-local cumulative sums; returns chunk_size and the scale, 1 for None."""
    sizes = {}
    checks.tensor("g", g, letters, sizes)
    checks.sequences(cu_seqlens, sizes)
    expected = "a power of two of at least 8"
    checks.integer("chunk_size", chunk_size, expected)
    checks.require(chunk_size >= 8 and chunk_size & (chunk_size - 1) == 0, "chunk_size", expected, chunk_size)
    checks.chunk_list(chunk_size, cu_seqlens, chunk_indices, sizes["T"])
    return int(chunk_size), checks.scale_or(scale, 1.0)


def gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe, g):
    """The options of the in-kernel gate, for g [B, T, HV, K].

    Returns A_log [HV] and dt_bias [HV * K], None where not given. Without `use_gate_in_kernel` both are None:
    FLA takes them there too, and does not read them.
    """
    checks.flags(use_gate_in_kernel=use_gate_in_kernel)
    safe_gate(safe, lower_bound, needed=use_gate_in_kernel)
    if use_gate_in_kernel:
        return raw_gate(g, A_log, dt_bias, lower_bound)
    _gate_parameters(g, A_log, dt_bias)
    return None, None


def raw_gate(g, A_log, dt_bias, lower_bound):
    """A gate activation's arguments, for g [..., HV, K]; returns A_log [HV] and dt_bias [HV * K] or None."""
    checks.floating("g", g)
    checks.require(
        g.ndim >= 2 and min(g.shape) >= 1, "g", "a shape [..., HV, K] with each of at least 1", g.shape
    )
    checks.number_or("lower_bound", lower_bound, None)
    given = A_log is not None or lower_bound is not None
    checks.require(given, "A_log", "an array [HV] for the gate unless lower_bound is given", "None")
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
    checks.floating(name, x)
    expected = " or ".join(f"{letters} = {shape}" for letters, shape in shapes.items())
    size = math.prod(next(iter(shapes.values())))
    came = f"{x.shape}; of a padded one, take the first {size}" if x.size > size else x.shape
    checks.require(x.shape in shapes.values(), name, expected, came)
    checks.no_wider(name, x, "g", g.dtype)
    return x if x.ndim == 1 else x.reshape(-1)


def safe_gate(safe, lower_bound, needed=False):
    """FLA's rules for `safe_gate`: with it, `lower_bound` lies in [-5, 0); it must be given if `needed`."""
    checks.flags(safe_gate=safe)
    checks.number_or("lower_bound", lower_bound, None)
    if safe and (needed or lower_bound is not None):
        in_range = lower_bound is not None and -5 <= lower_bound < 0
        checks.require(in_range, "lower_bound", "a number in [-5, 0) with safe_gate", lower_bound)


def sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval):
    """The factor of beta's sigmoid, None where beta comes activated."""
    checks.flags(use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval)
    needed = "use_beta_sigmoid_in_kernel beside it"
    checks.require(
        use_beta_sigmoid_in_kernel or not allow_neg_eigval, "allow_neg_eigval", needed, allow_neg_eigval
    )
    return (2.0 if allow_neg_eigval else 1.0) if use_beta_sigmoid_in_kernel else None


def pool(
    v, k, initial_state, state_v_first, cu_seqlens, ssm_state_indices, num_accepted_tokens,
    inplace_final_state, out,
):  # fmt: skip
    """The states of `fused_recurrent_kda_fwd`, for inputs that have been checked."""
    if out is not None:
        raise TypeError(f"out: expected None, got {checks.describe(out)}; the output is returned")
    indices, accepted = ssm_state_indices, num_accepted_tokens
    if indices is None:
        came = "None; pass inplace_final_state=False"
        given = initial_state is not None or not inplace_final_state
        checks.require(given, "initial_state", "states [N, HV, K, V] with inplace_final_state", came)
        came = checks.describe(accepted)
        checks.require(accepted is None, "num_accepted_tokens", "None without ssm_state_indices", came)
        return
    B, T, HV, V = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    checks.integers("ssm_state_indices", indices)
    right = indices.ndim in (1, 2) and indices.shape[0] == N and min(indices.shape) >= 1
    checks.require(right, "ssm_state_indices", f"a shape [N] or [N, M] with N={N}", indices.shape)
    checks.require(
        initial_state is not None, "initial_state", "the pool [P, HV, K, V] of the indices", "None"
    )
    letters = "P HV V K" if state_v_first else "P HV K V"
    checks.tensor("initial_state", initial_state, letters, dict(HV=HV, V=V, K=k.shape[-1]))
    P, M = initial_state.shape[0], 1 if indices.ndim == 1 else indices.shape[1]
    longest = T
    if cu_seqlens is not None:
        longest = int(np.diff(np.asarray(cu_seqlens)).max()) if concrete(cu_seqlens) else 0
    fits = longest <= M or not inplace_final_state
    checks.require(
        fits, "ssm_state_indices", f"[N, M] with a slot for each of {longest} tokens", indices.shape
    )
    if concrete(indices):
        most = int(np.asarray(indices).max())
        checks.require(most < P, "ssm_state_indices", f"indices below P={P}", most)
    if accepted is not None:
        checks.integers("num_accepted_tokens", accepted)
        checks.require(accepted.shape == (N,), "num_accepted_tokens", f"[N] = ({N},)", accepted.shape)
        if concrete(accepted):
            for x in np.asarray(accepted):
                checks.require(x in range(1, M + 1), "num_accepted_tokens", f"numbers from 1 to M={M}", x)


def mesh_axes(mesh, axes, sizes):
    """`axes`: {argument: (axis of `mesh` or None, letter of `sizes`)}; its devices divide that size."""
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {checks.describe(mesh)}")
    taken = set()
    for name, (axis, letter) in axes.items():
        if axis is None:
            continue
        checks.require(
            axis in mesh.axis_names, name, f"an axis of the mesh, one of {mesh.axis_names}", repr(axis)
        )
        checks.require(axis not in taken, name, "an axis that nothing else is sharded over", repr(axis))
        taken.add(axis)
        devices = f"{mesh.shape[axis]} devices of mesh axis {axis!r}"
        size = sizes[letter]
        checks.require(
            size % mesh.shape[axis] == 0, "q", f"{letter} a multiple of the {devices}", f"{letter}={size}"
        )


def index_helper(cu_seqlens, chunk_size=1):
    """The contract of `prepare_lens` and `prepare_chunk_offsets`; returns cu_seqlens as an array."""
    cu_seqlens = checks.listed(cu_seqlens)
    checks.ends("cu_seqlens", cu_seqlens)
    checks.at_least_one("chunk_size", chunk_size)
    return dict(cu_seqlens=cu_seqlens)


def known_index_helper(cu_seqlens, chunk_size, cu_seqlens_cpu):
    """The contract of `prepare_chunk_indices`, whose number of rows follows from the values of cu_seqlens."""
    taken = index_helper(cu_seqlens, chunk_size)
    cu_seqlens_cpu = checks.listed(cu_seqlens_cpu)
    if not concrete(checks.known_sequences(taken["cu_seqlens"], cu_seqlens_cpu)):
        raise TypeError("cu_seqlens: expected values that are known (not under jit), got a traced array")
    return taken | dict(cu_seqlens_cpu=cu_seqlens_cpu)
