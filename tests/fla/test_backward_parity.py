"""Against FLA's own kernels: the backward stage by stage, and the whole."""

import inspect
import itertools
from functools import cache

import kernels
import numpy as np
import pytest
from test_parity import CASES, PACKED, assert_near, distance, fla_forward

import tops.cpu.kda as kda

slow = pytest.mark.slow
NAMES = ("dq", "dk", "dv", "db", "dg", "dh0", "dA", "dbias")
SAVED = ("w", "u", "qg", "kg", "v_new", "h")
# Packing, GVA, a chunk of 32 and of 64, states of either layout, a raw gate; the others are slow.
FEW = ("packed_32", "sigmoid_A_bias")
MORE = (
    "packed",
    "softplus_bias",
    "dense",
    "dense_32",
    "gva",
    "one_token",
    "no_initial_state",
    "state_v_first",
    "sigmoid",
    "safe_gate",
)
ALL_CASES = [*FEW, *(pytest.param(case, marks=slow) for case in MORE)]
assert set(FEW + MORE) <= CASES.keys()
assert 0 in np.diff(PACKED)
assert 1 in np.diff(PACKED)


@cache
def fla(case, dtype):
    """The arguments of `chunk_kda_bwd`, FLA's gradients, and {stage: (its arguments, what it made)}."""
    (q, k, v, g, beta), options, fields = fla_forward(case, dtype)
    rng = np.random.default_rng(3)
    d_o = rng.standard_normal(v.shape).astype(dtype)
    d_states = rng.standard_normal(fields["final_state"].shape).astype(np.float32)
    gated = options.get("use_gate_in_kernel", False)
    given = {
        name: x for name, x in options.items() if name not in ("output_final_state", "initial_state", "scale")
    }
    arguments = (
        *(q, k, v, beta, fields["Aqk"], fields["Akk"], options.get("scale") or k.shape[-1] ** -0.5),
        *(options["initial_state"], d_o, d_states),
    )
    given |= dict(g=fields["g"], g_org=g if gated else None)
    saved = {name: fields[name] for name in SAVED}
    made, stages = kernels.chunk_kda_bwd(*arguments, **given, **saved)
    return arguments, given | saved, dict(zip(NAMES, made, strict=True)), stages


def ours(arguments, given, storage_dtype=None):
    return kda.chunk_kda_bwd(*arguments, **given, storage_dtype=storage_dtype)._asdict()


@pytest.mark.parametrize("dtype", [np.float32])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=slow)])
@pytest.mark.parametrize("case", ALL_CASES)
def test_float32(case, recompute, dtype):
    """Every gradient is within 2e-5 of FLA's, of FLA's saved fields or made again; None where FLA's is."""
    arguments, given, theirs, _ = fla(case, dtype)
    if recompute:
        given = {name: x for name, x in given.items() if name not in SAVED} | dict(disable_recompute=False)
    for name, x in ours(arguments, given).items():
        assert (x is None) == (theirs[name] is None), name
        if x is not None:
            assert x.shape == theirs[name].shape and x.dtype == theirs[name].dtype, name
            assert distance(x, theirs[name]) <= 2e-5 * distance(theirs[name], 0), name


def ends_of_chunks(B, T, cu_seqlens=None, chunk_size=64, **_):
    """Where a token is the last of its chunk, [B, T]."""
    spans = [(0, T)] if cu_seqlens is None else itertools.pairwise(cu_seqlens)
    ends = [min(first + chunk_size, end) for start, end in spans for first in range(start, end, chunk_size)]
    return np.broadcast_to(np.isin(np.arange(T) + 1, ends), (B, T))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, np.float32) for case in FEW),
        *(("packed_32", dtype) for dtype in kernels.STORAGE_DTYPES),
        *(pytest.param(case, np.float32, marks=slow) for case in MORE),
        *(
            pytest.param(case, dtype, marks=slow)
            for case in ("sigmoid_A_bias", *MORE)
            for dtype in kernels.STORAGE_DTYPES
        ),
    ],
)
def test_stages(case, dtype):
    """Each stage on what FLA's earlier ones made: within 2e-5 in float32, and with FLA's roundings 99.9 % of
    each tensor within 2 ulp of k's dtype. Not compared on a GPU in float16: dg of a chunk's last token, for
    which FLA sums V products in float16, there in the order of its threads."""
    *_, stages = fla(case, dtype)
    for stage, (arguments, theirs) in stages.items():
        op = getattr(kda, stage)
        rounds = "storage_dtype" in inspect.signature(op).parameters and dtype != np.float32
        made = op(**arguments, **(dict(storage_dtype=dtype) if rounds else {}))
        for i, (x, y) in enumerate(zip(made, theirs, strict=True)):
            name = stage, i
            assert (x is None) == (y is None), name
            if x is None:
                continue
            x = np.asarray(x)
            assert x.shape == y.shape and x.dtype == y.dtype, name
            if dtype == np.float32:
                assert distance(x, y) <= 2e-5 * distance(y, 0), name
                continue
            if kernels.CUDA and dtype == np.float16 and name == ("chunk_kda_bwd_wy_dqkg_fused", 4):
                inside = ~ends_of_chunks(*x.shape[:2], **arguments)
                x, y = x[inside], y[inside]
            assert_near({name: (y.astype(dtype), x.astype(dtype))}, ulps=2)


@pytest.mark.parametrize("dtype", kernels.STORAGE_DTYPES)
@pytest.mark.parametrize(
    "case",
    ["packed_32", *(pytest.param(case, marks=slow) for case in ("whole_chunks", "sigmoid_A_bias", *MORE))],
)
def test_storage_dtype(case, dtype):
    """With FLA's roundings every gradient comes at least 4 times nearer to FLA's. On a GPU in float16 dg, and
    what is made of it, only where no chunk is short, and little is left of the state that entered it:
    `test_stages` says why."""
    arguments, given, theirs, _ = fla(case, dtype)
    given = {name: x for name, x in given.items() if name not in SAVED} | dict(disable_recompute=False)
    rounded, plain = ours(arguments, given, dtype), ours(arguments, given)
    on_threads = kernels.CUDA and dtype == np.float16 and case != "whole_chunks"
    left_out = ("dg", "dA", "dbias") if on_threads else ()
    for name, y in theirs.items():
        if y is not None and name not in left_out:
            assert 4 * distance(rounded[name], y) <= distance(plain[name], y), name
