"""Each adapter of the kit hands a foreign kernel the same problem, and its answer back: forward and gradient.

The kernels are the suite's recurrence in NumPy, called as other libraries call theirs. What an adapter moves
is moved exactly; where it multiplies, the bound is 1e-12 in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import recurrence

from tops.cpu.kda import naive_recurrent_kda
from tops.cpu.kda.testing import CATALOGUE, Case, adapters, check
from tops.cpu.kda.testing.adapters import compose

pytestmark = pytest.mark.unoptimized
SIZES = dict(H=2, HV=4, K=5, V=3)
DENSE = Case("a_dense_call", "", B=2, T=9, **SIZES)
PACKED = Case("a_packed_call", "", B=1, T=12, cu_seqlens=(0, 3, 3, 4, 10), **SIZES)
CASES = [DENSE, PACKED]


def fla(*, state_v_first=False, output_final_state=False, initial_state=None, chunk_size=64, **inputs):
    """The recurrence in FLA's convention."""
    turn = (lambda x: x.swapaxes(-1, -2)) if state_v_first else (lambda x: x)
    initial_state = initial_state if initial_state is None else turn(initial_state)
    o, states = recurrence(**inputs, initial_state=initial_state)
    return o, turn(states) if output_final_state else None


def assert_same_call(case, kernel, adapter, **changes):
    """The adapted kernel answers as the recurrence does."""
    inputs = case.inputs(np.float64) | case.options(False) | changes
    inputs = {name: x for name, x in inputs.items() if x is not None}
    o, final_state = adapter(kernel)(**{k: x.copy() if hasattr(x, "copy") else x for k, x in inputs.items()})
    o_true, state_true = fla(**inputs)
    n = case.T if case.cu_seqlens is None else case.cu_seqlens[-1]
    np.testing.assert_allclose(o[:, :n], o_true[:, :n], rtol=0, atol=1e-12)
    if state_true is not None:
        np.testing.assert_allclose(final_state, state_true, rtol=0, atol=1e-12)


def of_ids(ids, first, N):
    """cu_seqlens of the ids of one row that count from `first`; what is not one of N sequences is padding."""
    counts = [(ids == n + first).sum() for n in range(N)]
    ends = np.concatenate([[0], np.cumsum(counts)])
    np.testing.assert_array_equal(ids[: ends[-1]], np.repeat(np.arange(N) + first, counts))
    return ends


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("layout", "to_ours"),
    [("HBTK", (1, 2, 0, 3)), ("BHTK", (0, 2, 1, 3)), ("TBHK", (1, 0, 2, 3)), ("BTHK", (0, 1, 2, 3))],
)
def test_tokens(case, layout, to_ours):
    def kernel(q, k, v, g, beta, **options):
        assert dict(zip(layout, q.shape, strict=True)) == dict(B=case.B, T=case.T, H=case.H, K=case.K)
        arrays = dict(q=q, k=k, v=v, g=g, beta=beta[..., None])
        arrays = {name: x.transpose(to_ours) for name, x in arrays.items()}
        o, state = fla(**arrays | dict(beta=arrays["beta"][..., 0]), **options)
        return o.transpose(np.argsort(to_ours)), state

    assert_same_call(case, kernel, adapters.tokens(layout))


def test_tokens_of_one_row():
    """A batch is declined, or flattened before."""

    def kernel(cu_seqlens, **inputs):
        names = "q", "k", "v", "g", "beta"
        rows = {name: inputs.pop(name).swapaxes(0, 1)[None] for name in names}
        o, state = fla(**rows, cu_seqlens=cu_seqlens, **inputs)
        return o[0].swapaxes(0, 1), state

    adapter = adapters.tokens("HTK")
    assert_same_call(PACKED, kernel, adapter)
    with pytest.raises(NotImplementedError, match="a batch"):
        assert_same_call(DENSE, kernel, adapter)
    assert_same_call(DENSE, kernel, compose(adapters.flattened, adapter))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("state_v_first", [False, True])
@pytest.mark.parametrize("layout", ["NHKV", "NHVK", "BHVK", "HNKV", "BNHKV", "NBHVK"])
def test_states(case, state_v_first, layout):
    N = len(case.sequences)
    has_batch = "B" in layout and "N" in layout
    sizes = dict(N=N, H=case.HV, K=case.K, V=case.V)
    if has_batch:
        sizes |= dict(B=case.B, N=N // case.B)
    axes = layout if "N" in layout else layout.replace("B", "N")
    ours = "BNHKV" if has_batch else "NHKV"

    def kernel(initial_state, **inputs):
        assert initial_state.shape == tuple(sizes[axis] for axis in axes)
        state = np.einsum(f"{axes}->{ours}", initial_state).reshape(N, case.HV, case.K, case.V)
        o, state = fla(initial_state=state, **inputs)
        state = state.reshape([sizes[axis] for axis in ours])
        return o, np.einsum(f"{ours}->{axes}", state)

    state = case.inputs(np.float64)["initial_state"]
    turned = dict(initial_state=state.swapaxes(-1, -2), state_v_first=True) if state_v_first else {}
    assert_same_call(case, kernel, adapters.states(layout), **turned)
    none = dict(initial_state=None, output_final_state=None)
    assert_same_call(case, fla, adapters.states(layout), **none)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("first", [0, 1])
def test_segments(case, first):
    def kernel(segment_ids=None, **inputs):
        if segment_ids is not None:
            ids = np.where(segment_ids[0] == 0, -1, segment_ids[0]) if first else segment_ids[0]
            inputs["cu_seqlens"] = of_ids(ids, first, len(case.sequences))
            assert set(segment_ids[0, 10:]) == {0 if first else 4}  # padding
        return fla(**inputs)

    assert_same_call(case, kernel, adapters.segments(first))
    if case is PACKED:
        with pytest.raises(NotImplementedError, match="the states of packed"):
            assert_same_call(case, kernel, adapters.segment_ids)
    assert_same_call(DENSE, kernel, adapters.segment_ids)


def test_flattened():
    def kernel(cu_seqlens, **inputs):
        assert inputs["q"].shape[0] == 1
        return fla(cu_seqlens=cu_seqlens, **inputs)

    for case in CASES:
        assert_same_call(case, kernel, adapters.flattened)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("raw", [False, True])
def test_padded(case, raw):
    """Every sequence ends where a chunk does; padding neither writes nor forgets, also where it is raw."""

    def kernel(cu_seqlens=None, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, **inputs):
        ends = [0, inputs["q"].shape[1]] if cu_seqlens is None else cu_seqlens
        assert all(end % 4 == 0 for end in ends)
        assert inputs["q"].shape[1] % 4 == 0
        if raw:
            inputs["g"], inputs["beta"] = -np.logaddexp(0, inputs["g"]), 1 / (1 + np.exp(-inputs["beta"]))
        return fla(cu_seqlens=cu_seqlens, **inputs)

    inputs, changes = case.inputs(np.float64), {}
    if not raw:
        return assert_same_call(case, kernel, adapters.padded(4))

    def adapter(fn):
        def to_raw(g, beta, **options):
            g, beta = np.log(np.expm1(-g)), np.log(beta) - np.log1p(-beta)
            flags = dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
            with np.errstate(over="ignore"):
                return adapters.padded(4)(fn)(g=g, beta=beta, **flags, **options)

        return to_raw

    assert inputs.keys() >= {"g", "beta"}
    assert_same_call(case, kernel, adapter, **changes)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("flag", [None, "is_continued"])
@pytest.mark.parametrize("state_v_first", [False, True])
def test_pooled(case, flag, state_v_first):
    """Only the sequences' own places are read, and those that a flag tells to begin from zero are not."""

    def kernel(initial_state, ssm_state_indices, **inputs):
        pool = initial_state
        flags = inputs.pop(flag) if flag else np.ones(len(ssm_state_indices), bool)
        assert len(set(ssm_state_indices)) == len(case.sequences) < len(pool)
        states = np.where(flags[:, None, None, None], pool[ssm_state_indices], 0)
        inputs["output_final_state"] = True
        o, pool[ssm_state_indices] = fla(initial_state=states, **inputs)
        return o, pool

    adapter = adapters.pooled(has_initial_state=flag)
    state = case.inputs(np.float64)["initial_state"]
    turned = {}
    if state_v_first:
        turned = dict(initial_state=np.ascontiguousarray(state.swapaxes(-1, -2)), state_v_first=True)
    assert_same_call(case, kernel, adapter, **turned)
    assert_same_call(case, kernel, adapter, **turned | dict(initial_state=None))


def l2normed(q, k, **inputs):
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    return fla(q=q, k=k, **inputs)


def sigmoided(beta, **inputs):
    return fla(beta=1 / (1 + np.exp(-beta)), **inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_inputs(case):
    """q and k of any norm, and beta from 0 to 1."""
    rng = np.random.default_rng(0)
    inputs = case.inputs(np.float64)
    q, k = (inputs[name] * rng.uniform(0.3, 3, (*inputs[name].shape[:3], 1)) for name in "qk")
    k[:, 2] = 0
    assert_same_call(case, l2normed, adapters.always_l2norm, q=q, k=k)
    beta = inputs["beta"].copy()
    beta[:, :3] = [[[0.0], [1.0], [1e-6]]]
    assert_same_call(case, sigmoided, adapters.always_sigmoid, beta=beta)
    with pytest.raises(NotImplementedError, match="a beta beyond 1"):
        assert_same_call(case, sigmoided, adapters.always_sigmoid, beta=beta + 1)
    assert_same_call(case, lambda g, **x: fla(g=np.log(g), **x), adapters.decays)
    assert_same_call(case, lambda **x: fla(**x, scale=1.0), adapters.unscaled)


def test_what_is_asked_for_is_handed_on():
    seen = {}

    def kernel(**options):
        seen.update(options)
        return options["v"], None

    inputs = DENSE.inputs(np.float64)
    always = compose(adapters.always_l2norm, adapters.always_sigmoid)(kernel)
    always(**inputs, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    assert seen.keys() == inputs.keys()
    assert all(np.array_equal(seen[name], x) for name, x in inputs.items())
    with pytest.raises(NotImplementedError, match="a beta beyond 1"):
        always(**inputs, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)


def test_what_an_op_cannot_do_is_declined():
    inputs = PACKED.inputs(np.float64)
    with pytest.raises(NotImplementedError, match="packing"):
        adapters.unpacked(fla)(**inputs)

    def refuses(**inputs):
        raise ValueError("expected K of 128")

    with pytest.raises(NotImplementedError, match="expected K of 128"):
        adapters.declines(ValueError)(refuses)(**inputs)
    with pytest.raises(ValueError, match="expected K of 128"):
        adapters.declines(TypeError)(refuses)(**inputs)


def foreign(query, key, value, decay, beta, state=None):
    """A kernel with everything otherwise: [H, B, T, K], states [B, N, H, V, K], decays, no scale, no groups;
    it returns a state always."""
    xp = jnp if isinstance(query, jax.Array) else np
    arrays = (xp.moveaxis(x, 0, 2) for x in (query, key, value, xp.log(decay), beta))
    state = None if state is None else state[:, 0].swapaxes(-1, -2)
    o, state = (jax_recurrence if xp is jnp else recurrence)(*arrays, scale=1.0, initial_state=state)
    return xp.moveaxis(o, 2, 0).astype(query.dtype), state.astype(query.dtype).swapaxes(-1, -2)[:, None]


def jax_recurrence(*arrays, **options):
    return naive_recurrent_kda(*arrays, **options, output_final_state=True)


FOREIGN = compose(
    *(adapters.plain, adapters.unpacked, adapters.ungrouped, adapters.unscaled, adapters.decays),
    *(adapters.states("BNHVK"), adapters.tokens("HBTK")),
    adapters.renamed(
        q="query", k="key", v="value", g="decay", initial_state="state", output_final_state=None
    ),
)


@pytest.mark.slow
def test_the_kit_through_a_chain_of_them():
    report = check(foreign, "dense,packed", adapter=FOREIGN, arrays="numpy")
    assert report.ok, str(report)
    assert report.declined == ["packed"]
    assert len(report.rows) == 2


def test_a_gradient_goes_through_a_chain_of_them():
    """Of all inputs, against that of the op which needs none of it; float64, 1e-11."""
    inputs = {name: jnp.asarray(x) for name, x in DENSE.inputs(np.float64).items()}
    options = dict(output_final_state=True)

    @jax.jit
    def gradients(inputs):
        results, vjp = jax.vjp(lambda inputs: naive_recurrent_kda(**inputs, **options), inputs)
        cotangents = tuple(jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in results)
        adapted = FOREIGN(foreign), NORMED(l2normed_and_sigmoided)
        return vjp(cotangents)[0], [
            jax.vjp(lambda inputs, fn=fn: fn(**inputs, **options), inputs)[1](cotangents)[0] for fn in adapted
        ]

    expected, found = gradients(inputs)
    for made in found:
        assert made.keys() == expected.keys()
        for name, x in made.items():
            np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-11, err_msg=name)


def l2normed_and_sigmoided(q, k, v, g, beta, **options):
    q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    return naive_recurrent_kda(q, k, v, g, jax.nn.sigmoid(beta), **options)


NORMED = compose(adapters.always_l2norm, adapters.always_sigmoid, adapters.padded(4))


@pytest.mark.parametrize(
    "adapter", [adapters.segments(1), adapters.flattened, adapters.padded(4), adapters.pooled("at", "begins")]
)
@pytest.mark.parametrize("kind", [np.ndarray, jax.Array])
def test_what_an_adapter_adds_is_of_the_kind_of_the_inputs(adapter, kind):
    case = DENSE if adapter is adapters.flattened else PACKED
    inputs = {name: jnp.asarray(x) if kind is jax.Array else x for name, x in case.inputs().items()}

    def kernel(**options):
        assert all(isinstance(x, kind) for x in options.values())
        return options["v"], options["initial_state"]

    adapter(kernel)(**inputs)


def test_words():
    arrays = {name: CATALOGUE["dense"].inputs(np.float32)[name] for name in ("q", "k", "v", "g", "beta")}
    seen = []

    def kernel(**options):
        seen.append({name: getattr(x, "shape", x) for name, x in options.items()})
        return options["v"], None

    adapters.of("plain, ungrouped,tokens=HBTK")(kernel)(**arrays, chunk_size=16)
    compose(adapters.plain, adapters.ungrouped, adapters.tokens("HBTK"))(kernel)(**arrays, chunk_size=16)
    assert seen[0] == seen[1]
    assert seen[0]["k"] == (4, 2, 150, 32)
    for words in ("plain,nothing", "tokens", "plain=3", "segments=x", ""):
        with pytest.raises(ValueError, match=r"adapter: expected words of plain, .* got "):
            adapters.of(words)
    with pytest.raises(ValueError, match="tokens: expected an order of B, T, H, K"):
        adapters.of("tokens=BTK")
    with pytest.raises(ValueError, match="states: expected an order of N, H, K, V"):
        adapters.of("states=NHK")
    with pytest.raises(ValueError, match="activated: expected qk, g or beta, got 'q'"):
        adapters.of("activated=q")
    with pytest.raises(
        ValueError, match=r"adapter: expected pooled, .* behind all else, got 'tokens=HBTK,plain'"
    ):
        adapters.of("tokens=HBTK,plain")
