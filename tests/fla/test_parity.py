"""Against FLA's own kernels: the forward field by field, its stages, the gates and the user-level ops."""

import importlib
import inspect
from functools import cache

import kernels
import numpy as np
import pytest
from fla_calls import BY_POSITION
from inputs import draw
from oracle import recurrence, relative_error

import tops.cpu.kda as kda
from tops.cpu.kda.testing.compare import ordinal

# The arguments of `draw` and the options of the forward. The packed case has an empty sequence and one token.
PACKED = np.array([0, 40, 40, 41, 90])
C32 = dict(chunk_size=32)
CASES = dict(
    dense=(dict(B=2, T=70), dict()),
    dense_32=(dict(B=2, T=40), C32),
    whole_chunks=(dict(T=64), C32),
    one_token=(dict(B=2, T=1), dict()),
    wide=(dict(T=40, K=64, V=32), C32 | dict(scale=0.7)),
    gva=(dict(T=40, HV=4), C32),
    no_initial_state=(dict(T=40), C32 | dict(initial_state=None)),
    state_v_first=(dict(T=40, K=64, V=32), C32 | dict(state_v_first=True)),
    packed=(dict(T=90), dict(cu_seqlens=PACKED)),
    packed_32=(dict(T=90, HV=4), C32 | dict(cu_seqlens=PACKED, state_v_first=True)),
    softplus=(dict(T=40), C32 | dict(gate=("A_log",))),
    softplus_bias=(dict(T=40, HV=4), C32 | dict(gate=("A_log", "dt_bias"))),
    sigmoid=(dict(T=40), C32 | dict(gate=(), lower_bound=-5.0)),
    sigmoid_bias=(dict(T=40), C32 | dict(gate=("dt_bias",), lower_bound=-5.0)),
    sigmoid_A=(dict(T=40), C32 | dict(gate=("A_log",), lower_bound=-5.0)),
    sigmoid_A_bias=(dict(T=90), C32 | dict(gate=("A_log", "dt_bias"), lower_bound=-5.0, cu_seqlens=PACKED)),
    safe_gate=(dict(T=70), dict(gate=("A_log", "dt_bias"), lower_bound=-5.0, safe_gate=True)),
)


# The interpreter takes seconds a case. These have every kernel, both gates, both chunk sizes, packing, GVA
# and both state layouts; `make test-fla-all` runs the others too.
FEW = ("packed_32", "softplus_bias", "sigmoid_A_bias", "safe_gate")
slow = pytest.mark.slow
ALL_CASES = [*FEW, *(pytest.param(case, marks=slow) for case in CASES if case not in FEW)]


def test_arguments_by_position():
    """What the suite says of them is what FLA's functions have."""
    names = ["chunk", "chunk_fwd", "chunk_bwd", "fused_recurrent", "naive", "chunk_intra", "wy_fast", "gate"]
    names = [f"fla.ops.kda.{name}" for name in names] + ["fla.ops.common.chunk_delta_h", "fla.ops.gla.chunk"]
    modules = [importlib.import_module(name) for name in [*names, "fla.ops.utils"]]
    for name, arguments in BY_POSITION.items():
        op = next(getattr(module, name) for module in modules if hasattr(module, name))
        parameters = inspect.signature(op).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == arguments.split(), name


def prepare(sizes, options, regime="logsigmoid", dtype=np.float32):
    """The inputs and the keyword arguments that both take."""
    q, k, v, g, beta = draw(regime, **dict(H=2, K=32) | sizes)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    options = dict(output_final_state=True, disable_recompute=True) | options
    rng = np.random.default_rng(1)
    HV, V, K = *v.shape[2:], q.shape[-1]
    if "initial_state" not in options:
        N = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else len(q)
        state = (V, K) if options.get("state_v_first") else (K, V)
        options["initial_state"] = rng.standard_normal((N, HV, *state)).astype(np.float32)
    if "gate" in options:
        g = rng.standard_normal(g.shape).astype(np.float32)
        made = dict(A_log=rng.standard_normal(HV), dt_bias=rng.standard_normal(HV * K))
        options |= {name: made[name].astype(np.float32) for name in options.pop("gate")}
        options["use_gate_in_kernel"] = True
    return (q, k, v, g, beta), options


@cache
def fla_forward(case, dtype):
    """The inputs, the options, and FLA's fields for them."""
    inputs, options = prepare(*CASES[case], dtype=dtype)
    return inputs, options, kernels.chunk_kda_fwd(*inputs, **options)


def every_field(inputs, options, theirs, **ours_alone):
    """`pairs` of the forwards' fields. One is None where FLA's is, and nowhere else."""
    ours = kda.chunk_kda_fwd(*inputs, **options, **ours_alone)._asdict()
    made = [name for name in theirs if theirs[name] is not None]
    assert made == [name for name in ours if ours[name] is not None]
    return pairs(theirs, {name: ours[name] for name in made}, options)


def pairs(theirs, ours, options):
    """{field: (FLA's, ours)} of our fields. Aqk only where FLA writes it: elsewhere ours is zero."""
    fields = {name: (theirs[name], np.asarray(x)) for name, x in ours.items()}
    for name, (x, y) in fields.items():
        assert x.shape == y.shape and x.dtype == y.dtype, name
    if "Aqk" in fields:
        written = causal(*fields["Aqk"][0].shape, options.get("cu_seqlens"))
        assert not fields["Aqk"][1][~written].any()
        fields["Aqk"] = tuple(x[written] for x in fields["Aqk"])
    return fields


def causal(B, T, HV, C, cu_seqlens):
    """Where column j of row i of a chunk has j <= i, [B, T, HV, C]."""
    starts = np.array([0]) if cu_seqlens is None else cu_seqlens
    token = np.arange(T)
    row = (token - starts[np.searchsorted(starts, token, side="right") - 1]) % C
    return np.broadcast_to((np.arange(C) <= row[:, None])[:, None], (B, T, HV, C))


def assert_near(fields, ulps):
    """Within 5e-6, relative (Frobenius), in float32; 99.9 % of the elements within `ulps` in 16 bits."""
    for name, (theirs, ours) in fields.items():
        if theirs.dtype == np.float32:
            assert distance(ours, theirs) <= 5e-6 * distance(theirs, 0), name
        else:
            theirs, ours = (ordinal(without_underflow(x)) for x in (theirs, ours))
            assert np.mean(np.abs(ours - theirs) <= ulps) >= 0.999, name


def without_underflow(x):
    """Zero for what lies below float32's normal numbers: XLA flushes it on a CPU, compiled kernels need not,
    and in bfloat16 it is up to 127 ulp."""
    return np.where(np.abs(x.astype(np.float32)) < np.finfo(np.float32).tiny, np.zeros_like(x), x)


def distance(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - np.asarray(y, np.float64))


@pytest.mark.parametrize("dtype", [np.float32])
@pytest.mark.parametrize("case", ALL_CASES)
def test_float32(case, dtype):
    """Every field is within 5e-6 of FLA's."""
    fields = every_field(*fla_forward(case, dtype))
    assert len(fields) >= 11
    assert_near(fields, None)


@pytest.mark.parametrize("disable_recompute", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("return_intermediate_states", [False, True])
def test_the_same_fields_are_none(disable_recompute, gate, return_intermediate_states):
    """A field is None where FLA's is, and nowhere else."""
    options = dict(
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
        output_final_state=disable_recompute,
        initial_state=None,
    )
    inputs, options = prepare(dict(T=1), options | dict(gate=("A_log",)) if gate else options)
    every_field(inputs, options, kernels.chunk_kda_fwd(*inputs, **options))


def test_masking_gates():
    """30 % of the gates -1000: FLA's cumulative sums lose the others, and its o errs by more than 1e-5. Ours
    keeps to 4e-7 of the float64 recurrence."""
    inputs, options = prepare(dict(T=100), dict(initial_state=None), regime="masks")
    fields = every_field(inputs, options, kernels.chunk_kda_fwd(*inputs, **options))
    for name, truth in zip(("o", "final_state"), recurrence(*inputs), strict=True):
        theirs, ours = (relative_error(x, truth) for x in fields[name])
        assert ours <= 4e-7
        assert theirs > 1e-5 or name != "o"


@pytest.mark.parametrize("dtype", kernels.STORAGE_DTYPES)
@pytest.mark.parametrize(
    "case", ["packed_32", *(pytest.param(case, marks=slow) for case in ("softplus_bias", "dense"))]
)
def test_storage_dtype(case, dtype):
    """With FLA's roundings o and the final state come at least 4 times nearer to FLA's, and 99.9 % of every
    field that FLA rounds is within 2 ulp. Not all: where the two float32 results lie on either side of a
    rounding boundary, one ulp starts that the later stages carry on; `test_stages` looks at each alone."""
    inputs, options, theirs = fla_forward(case, dtype)
    fields = every_field(inputs, options, theirs, storage_dtype=dtype)
    unrounded = kda.chunk_kda_fwd(*inputs, **options)
    for name in ("o", "final_state"):
        theirs, ours = fields[name]
        assert 4 * distance(ours, theirs) <= distance(getattr(unrounded, name), theirs), name
    assert_near({name: fields[name] for name in ("Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h")}, ulps=2)


@pytest.mark.parametrize("dtype", kernels.STORAGE_DTYPES)
@pytest.mark.parametrize(
    ("case", "regime"),
    [("packed_32", "logsigmoid"), ("gva", "weak")],
)
@slow
def test_beta_of_k_s_dtype(case, regime, dtype):
    """FLA rounds beta k to it before the decay: with that, 99.9 % of w are within 2 ulp, and of what follows
    where the gates do not carry an ulp on from chunk to chunk."""
    inputs, options = prepare(*CASES[case], dtype=dtype, regime=regime)
    inputs = (*inputs[:4], inputs[4].astype(dtype))
    fields = every_field(inputs, options, kernels.chunk_kda_fwd(*inputs, **options), storage_dtype=dtype)
    names = ("w",) if regime == "weak" else ("w", "u", "v_new", "h", "kg")
    assert_near({name: fields[name] for name in names}, ulps=2)


@pytest.mark.parametrize("dtype", [np.float32, *kernels.STORAGE_DTYPES])
@pytest.mark.parametrize("case", [pytest.param("dense_32", marks=slow), "packed_32"])
def test_stages(case, dtype):
    """Each stage on what FLA's earlier stages stored: within 5e-6 in float32, and with FLA's roundings 99.9 %
    within 1 ulp."""
    (q, k, v, _, beta), options, fla = fla_forward(case, dtype)
    scale = options.get("scale")
    stored = dict(storage_dtype=None if dtype == np.float32 else dtype)
    packing = {name: options[name] for name in ("cu_seqlens",) if name in options}
    chunks = packing | dict(chunk_size=options.get("chunk_size", 64))
    layout = dict(state_v_first=options.get("state_v_first", False))

    def check(**ours):
        assert_near(pairs(fla, ours, options), ulps=1)

    _, _, qg, kg, Aqk, Akk = kda.chunk_kda_fwd_intra(
        q, k, v, fla["g"], beta, scale, disable_recompute=True, **chunks, **stored
    )
    check(qg=qg, kg=kg, Aqk=Aqk, Akk=Akk)
    w, u, qg, kg = kda.recompute_w_u_fwd(k, v, beta, fla["Akk"], gk=fla["g"], q=q, **packing, **stored)
    check(w=w, u=u, qg=qg, kg=kg)
    h, v_new, final_state = kda.chunk_gated_delta_rule_fwd_h(
        fla["kg"], fla["w"], fla["u"], None, fla["g"], options["initial_state"], True,
        **chunks, **layout, **stored,
    )  # fmt: skip
    check(h=h, v_new=v_new)
    bound = 5e-6 if dtype == np.float32 else 1e-4
    assert distance(final_state, fla["final_state"]) <= bound * distance(final_state, 0)
    o = kda.chunk_gla_fwd_o_gk(
        q, fla["v_new"], fla["g"], fla["Aqk"], fla["h"], scale, **chunks, **layout, **stored
    )
    check(o=o)


@pytest.mark.parametrize(
    "case",
    [
        "softplus_bias",
        "sigmoid_A_bias",
        *(pytest.param(x, marks=slow) for x in ("softplus", "sigmoid", "sigmoid_bias")),
    ],
)
def test_gates(case):
    """The gate alone, and its sum over chunks: within 1e-6 of FLA's."""
    (_, _, _, g, _), options = prepare(*CASES[case])
    given = {name: options.get(name) for name in ("A_log", "dt_bias", "lower_bound")}
    packing = {name: options[name] for name in ("cu_seqlens",) if name in options}
    same(kernels.kda.gate.fused_kda_gate, kda.fused_kda_gate, g, **given)
    arguments = dict(chunk_size=32, scale=1 / np.log(2)) | given | packing
    same(kernels.kda.gate.kda_gate_chunk_cumsum, kda.kda_gate_chunk_cumsum, g, **arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packing", [dict(), dict(cu_seqlens=PACKED)], ids=["dense", "packed"])
def test_chunk_local_cumsum(packing, reverse):
    """Vector and scalar gates: within 1e-6 of FLA's."""
    g = draw(T=90, H=2, K=32)[3]
    for x in (g, g[..., 0]):
        options = dict(chunk_size=32, reverse=reverse, scale=0.7) | packing
        same(kernels.forward.chunk_local_cumsum, kda.chunk_local_cumsum, np.ascontiguousarray(x), **options)


RAW = dict(use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("op", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize(
    ("case", "raw"),
    [
        pytest.param("dense", dict(), marks=slow),
        pytest.param("wide", dict(use_qk_l2norm_in_kernel=True), marks=slow),
        pytest.param("gva", dict(use_beta_sigmoid_in_kernel=True), marks=slow),
        pytest.param(
            "state_v_first", dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True), marks=slow
        ),
        pytest.param("softplus_bias", RAW | dict(allow_neg_eigval=True), marks=slow),
        ("sigmoid_A_bias", RAW),
    ],
)
def test_user_level(op, case, raw):
    """o and the final state with everything that the kernels can do to raw inputs: within 5e-6 of FLA's."""
    (q, k, v, g, beta), options = prepare(*CASES[case])
    if "use_qk_l2norm_in_kernel" in raw:
        q, k = 3 * q, 0.1 * k
    if "use_beta_sigmoid_in_kernel" in raw:
        beta = np.random.default_rng(2).standard_normal(beta.shape).astype(np.float32)
    del options["disable_recompute"]
    if op == "fused_recurrent_kda":
        options.pop("chunk_size", None)
    same(getattr(kernels.kda, op), getattr(kda, op), q, k, v, g, beta, **options, **raw, bound=5e-6)


def same(theirs, ours, *args, bound=1e-6, **kwargs):
    theirs, ours = kernels.run(theirs, *args, **kwargs), ours(*args, **kwargs)
    both = zip(theirs, ours, strict=True) if isinstance(theirs, tuple) else [(theirs, ours)]
    for x, y in both:
        assert x.shape == y.shape
        assert distance(y, x) <= bound * distance(x, 0)
