"""FLA's contract backwards: every gradient, every stage on its own.

Each stage is judged by the definitions in `oracle_backward`, the whole also by `jax.vjp` of `chunk_kda` and
of the token recurrence. The stages see the gates only as cumulative sums, and so does the judge.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_backward
import pytest
from inputs import REGIMES, draw
from oracle import relative_error
from test_contract import GATES, gate_arguments, sigmoid

from tops.cpu.kda import (
    chunk_gated_delta_rule_bwd_dhu,
    chunk_kda,
    chunk_kda_bwd,
    chunk_kda_bwd_dAv,
    chunk_kda_bwd_intra,
    chunk_kda_bwd_wy_dqkg_fused,
    chunk_kda_fwd,
    chunk_local_cumsum,
    fused_recurrent_kda,
    kda_gate_bwd,
    naive_recurrent_kda,
)

slow, unoptimized = pytest.mark.slow, pytest.mark.unoptimized
T, H, HV, K, V = 150, 2, 4, 16, 12
CU_SEQLENS = np.array([0, 70, 70, 71, 140])  # an empty sequence, one token, padding
SAVED = ("w", "u", "qg", "kg", "v_new", "h")


def case(packed=False, dtype=np.float64, regime="logsigmoid", seed=0):
    """The inputs, the initial states, the cotangents of o and of the final states, and the packing."""
    inputs = draw(regime, B=1 if packed else 2, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype, seed=seed)
    rng = np.random.default_rng(seed + 1)
    N = len(CU_SEQLENS) - 1 if packed else 2
    wide = np.result_type(dtype, np.float32)
    states, d_states = rng.standard_normal((2, N, HV, K, V)).astype(wide)
    d_o = rng.standard_normal(inputs[2].shape).astype(dtype)
    return inputs, states, (d_o, d_states), dict(cu_seqlens=CU_SEQLENS) if packed else {}


def turned(x, state_v_first):
    return x.swapaxes(-1, -2) if state_v_first else x


def chain(inputs, fields, cotangents, scale=None, initial_state=None, state_v_first=False, **options):
    """{name: tensor}: the stages by hand, from what the forward saved."""
    q, k, v, _, beta = inputs
    d_o, d_states = cotangents
    states = dict(state_v_first=state_v_first)
    made = dict(zip(("dAqk", "dv_of_o"), chunk_kda_bwd_dAv(
        q, k, fields.v_new, d_o, fields.Aqk, scale, **options), strict=True))  # fmt: skip
    dhu = chunk_gated_delta_rule_bwd_dhu(
        fields.qg, fields.kg, fields.w, d_o, made["dv_of_o"], gk=fields.g,
        h0=initial_state, dht=d_states, scale=scale, **states, **options,
    )  # fmt: skip
    made |= dict(zip(("dh", "dh0", "dv_new"), dhu, strict=True))
    ends = chunk_kda_bwd_wy_dqkg_fused(
        q, k, v, fields.v_new, fields.g, beta, fields.Akk, fields.h, d_o, made["dh"], made["dv_new"],
        scale, **states, **options,
    )  # fmt: skip
    names = ("ends_dq", "ends_dk", "dv", "ends_db", "ends_dG", "dAkk")
    made |= dict(zip(names, ends, strict=True))
    ends = (made[f"ends_{name}"] for name in ("dq", "dk", "db", "dG"))
    options = {name: x for name, x in options.items() if name != "storage_dtype"}
    intra = chunk_kda_bwd_intra(q, k, fields.g, beta, made["dAqk"], made["dAkk"], *ends, **options)
    made |= dict(zip(("dq", "dk", "db", "dG"), intra, strict=True))
    made["dg"] = chunk_local_cumsum(made["dG"], options.get("chunk_size", 64), True,
        cu_seqlens=options.get("cu_seqlens"), output_dtype=made["dG"].dtype)  # fmt: skip
    return made


def whole(inputs, fields, cotangents, recompute, initial_state=None, scale=None, **options):
    """`chunk_kda_bwd` of log decays."""
    q, k, v, _, beta = inputs
    saved = {} if recompute else {name: getattr(fields, name) for name in SAVED}
    return chunk_kda_bwd(
        *(q, k, v, beta, fields.Aqk, fields.Akk, scale, initial_state, *cotangents),
        **dict(g=fields.g, disable_recompute=not recompute),
        **saved,
        **options,
    )


@unoptimized
@pytest.mark.parametrize(
    ("packed", "state_v_first", "chunk_size"), [(True, True, 64), pytest.param(False, False, 32, marks=slow)]
)
def test_every_stage_is_what_it_is_defined_as(packed, state_v_first, chunk_size):
    """Against the definitions in float64: rounding alone lies between. Zero where there is no token."""
    inputs, states, cotangents, packing = case(packed)
    options = packing | dict(chunk_size=chunk_size, scale=0.7)
    given = turned(states, state_v_first)
    layout = dict(initial_state=given, state_v_first=state_v_first)
    fields = chunk_kda_fwd(*inputs, **options, **layout, disable_recompute=True)
    d_o, d_states = cotangents
    made = chain(inputs, fields, (d_o, turned(d_states, state_v_first)), **options, **layout)
    expected = oracle_backward.backward(
        inputs, fields.g, states, d_o, d_states, 0.7, chunk_size, packing.get("cu_seqlens")
    )
    # The cotangents of the sums are per log2 there, per nat here.
    expected |= {name: expected[name] / np.log(2) for name in ("dG", "ends_dG")}
    for name in made.keys() - {"dg"}:
        x = turned(made[name], state_v_first) if name in ("dh", "dh0") else made[name]
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-11, err_msg=name)
        if packed and name not in ("dh", "dh0"):
            assert not np.asarray(x)[:, CU_SEQLENS[-1] :].any(), name


@unoptimized
def test_the_chain_is_chunk_kda_bwd():
    """With what the forward saved bit for bit, but dg, which the chain sums from the cotangent of the sums;
    with all made again to rounding, as the forward makes v_new in another order."""
    inputs, states, cotangents, packing = case(packed=True)
    options = packing | dict(initial_state=turned(states, True), state_v_first=True, chunk_size=64, scale=0.7)
    cotangents = cotangents[0], turned(cotangents[1], True)
    fields = chunk_kda_fwd(*inputs, **options, disable_recompute=True)
    by_hand = chain(inputs, fields, cotangents, **options)
    by_hand |= {
        name: by_hand[name].reshape(*by_hand[name].shape[:2], H, 2, K).sum(3) for name in ("dq", "dk")
    }
    made = whole(inputs, fields, cotangents, False, **options)
    again = whole(inputs, fields, cotangents, True, **options)
    assert made.dA is made.dbias is None
    for name in ("dq", "dk", "dv", "db", "dg", "dh0"):
        if name != "dg":
            np.testing.assert_array_equal(getattr(made, name), by_hand[name], err_msg=name)
        assert relative_error(getattr(made, name), np.asarray(by_hand[name])) <= 1e-14, name
        assert relative_error(getattr(again, name), np.asarray(by_hand[name])) <= 1e-14, name


@unoptimized
@pytest.mark.parametrize(
    ("dtype", "packed", "recompute"),
    [(np.float32, True, True), (np.float64, False, False)],
)
@slow
def test_chunk_kda_bwd_is_the_vjp(dtype, packed, recompute):
    """1e-12 in float64, 1e-6 in float32, of what `jax.vjp` of `chunk_kda` gives."""
    inputs, states, cotangents, packing = case(packed, dtype)
    fields = chunk_kda_fwd(*inputs, initial_state=states, **packing, disable_recompute=True)
    made = whole(inputs, fields, cotangents, recompute, initial_state=states, **packing)

    def op(q, k, v, beta, g, state):
        return chunk_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **packing)

    q, k, v, g, beta = inputs
    pulled = jax.jit(lambda *x: jax.vjp(op, *x[0])[1](x[1]))((q, k, v, beta, g, states), cotangents)
    for name, x, y in zip(made._fields, made, pulled, strict=False):
        assert x.dtype == dtype
        bound = 1e-12 if dtype == np.float64 else 1e-6
        assert relative_error(x, np.asarray(y, np.float64)) <= bound, name


def held_by_sums(inputs, dtype):
    """The inputs with the log decays that float32's chunk-local sums of them hold, and those sums, log2."""
    sums = chunk_local_cumsum(inputs[3], 64, scale=1 / np.log(2), output_dtype=np.float32)
    G = np.asarray(sums, np.float64) * np.log(2)
    g = np.concatenate([np.diff(x, axis=1, prepend=0) for x in np.split(G, [64, 128], axis=1)], axis=1)
    q, k, v, _, beta = inputs
    return tuple(x.astype(dtype) for x in (q, k, v, g, beta)), sums


@jax.jit
def vjp_of_the_recurrence(arguments, cotangents):
    def op(q, k, v, g, beta, state):
        return naive_recurrent_kda(q, k, v, g, beta, None, state, output_final_state=True)

    return jax.vjp(op, *arguments)[1](cotangents)


@unoptimized
@slow
@pytest.mark.parametrize("regime", [regime for regime in REGIMES if regime != "resets"])
def test_float32(regime):
    """Within 4 times the error of the float32 recurrence's own gradient, of the decays that the sums hold; 16
    times for equal keys: there Akk itself, exact but rounded to float32, makes 12. (A sum holds no gate of
    -inf.)"""
    inputs, states, cotangents, _ = case(dtype=np.float32, regime=regime)
    wide, sums = held_by_sums(inputs, np.float64)
    fields = chunk_kda_fwd(*wide, initial_state=states.astype(np.float64), disable_recompute=True)
    fields = fields._replace(**{name: np.float32(getattr(fields, name)) for name in (*SAVED, "Aqk", "Akk")})
    made = whole(inputs, fields._replace(g=sums), cotangents, False, initial_state=states)
    truth = vjp_of_the_recurrence((*wide, states.astype(np.float64)), tuple(map(np.float64, cotangents)))
    recurrent = vjp_of_the_recurrence((*held_by_sums(inputs, np.float32)[0], states), cotangents)
    chunked = made.dq, made.dk, made.dv, made.dg, made.db, made.dh0
    for name, x, y, z in zip(("q", "k", "v", "g", "beta", "state"), chunked, recurrent, truth, strict=True):
        z = np.asarray(z)
        if not z.any():
            assert not np.asarray(x).any(), name
            continue
        error, allowed = relative_error(x, z), relative_error(y, z)
        assert error <= (16 if regime == "equal_keys" else 4) * allowed, (name, error, allowed)


@unoptimized
@pytest.mark.parametrize(
    ("gate", "recompute"),
    [
        (("A_log", "dt_bias", None), True),
        (("A_log", "dt_bias", -5.0), True),
        ((None, "dt_bias", -5.0), False),
    ],
)
@slow
def test_raw_gates(gate, recompute):
    """With dA and dbias, and none for what was not given: 1e-12 of `jax.vjp` of `chunk_kda`."""
    (q, k, v, _, beta), states, cotangents, packing = case(packed=True)
    rng = np.random.default_rng(2)
    g = rng.standard_normal((1, T, HV, K))
    parameters = dict(A_log=0.5 * rng.standard_normal(HV), dt_bias=rng.standard_normal(HV * K))
    parameters = {name: parameters[name] for name in gate[:2] if name}
    options = dict(use_gate_in_kernel=True, lower_bound=gate[2]) | packing
    fields = chunk_kda_fwd(
        q, k, v, g, beta, initial_state=states, disable_recompute=True, **options, **parameters
    )
    saved = {} if recompute else dict(g=fields.g) | {name: getattr(fields, name) for name in SAVED}
    made = chunk_kda_bwd(
        *(q, k, v, beta, fields.Aqk, fields.Akk, None, states, *cotangents),
        **dict(g_org=g, disable_recompute=not recompute),
        **(saved | options | parameters),
    )

    def op(q, k, v, beta, g, state, parameters):
        given = options | parameters
        return chunk_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **given)

    *pulled, d_parameters = jax.vjp(op, q, k, v, beta, g, states, parameters)[1](cotangents)
    pulled += [d_parameters.get(name) for name in ("A_log", "dt_bias")]
    for name, x, y in zip(made._fields, made, pulled, strict=True):
        assert (x is None) == (y is None), name
        assert x is None or relative_error(x, np.asarray(y)) <= 1e-12, name


@unoptimized
@slow
def test_nothing_given_for_the_states():
    """No initial state: no dh0. No dht: a zero one."""
    inputs, states, (d_o, d_states), _ = case()
    fields = chunk_kda_fwd(*inputs, disable_recompute=True)
    made = whole(inputs, fields, (d_o, None), False)
    expected = whole(inputs, fields, (d_o, 0 * d_states), False, initial_state=0 * states)
    assert made.dh0 is None
    for name in ("dq", "dk", "dv", "db", "dg"):
        np.testing.assert_array_equal(getattr(made, name), getattr(expected, name), err_msg=name)


@unoptimized
def test_padding_reaches_nothing():
    """NaN behind the last sequence, in every argument, raw gates included: the gradients of zeros there."""
    (q, k, v, _, beta), states, (d_o, d_states), packing = case(packed=True)
    g = np.random.default_rng(2).standard_normal((1, T, HV, K))
    options = dict(use_gate_in_kernel=True, A_log=np.zeros(HV), dt_bias=np.zeros(HV * K)) | packing

    def gradients(value):
        rows = [x.copy() for x in (q, k, v, beta, d_o, g)]
        for x in rows:
            x[:, CU_SEQLENS[-1] :] = value
        *qkv, b, d, raw = rows
        fields = chunk_kda_fwd(*qkv, raw, b, initial_state=states, disable_recompute=True, **options)
        forward = fields.Aqk, fields.Akk, None, states
        return chunk_kda_bwd(*qkv, b, *forward, d, d_states, g_org=raw, **options)

    for x, y in zip(gradients(np.nan), gradients(0), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)


@unoptimized
@slow
def test_traced_packing():
    """One compilation for every packing of N sequences: the bits of the eager call."""
    inputs, states, cotangents, packing = case(packed=True)

    def run(cu_seqlens):
        options = dict(initial_state=states, cu_seqlens=cu_seqlens)
        fields = chunk_kda_fwd(*inputs, **options, disable_recompute=True)
        return whole(inputs, fields, cotangents, True, **options)

    traced = jax.jit(run)
    for cu_seqlens in (packing["cu_seqlens"], np.array([0, 5, 80, 80, 150])):
        for x, y in zip(traced(cu_seqlens), run(cu_seqlens), strict=True):
            assert x is y is None or relative_error(x, np.asarray(y)) <= 1e-14


@unoptimized
@slow
def test_storage_dtype():
    """dh and dv are stored in it, and what comes of them is off by the size of a rounding: by 0.02 to 3 ulp,
    as sums of some tens of rounded terms are. What comes of the forward's tensors alone is not rounded."""
    dtype = np.float16
    inputs, states, cotangents, _ = case(dtype=dtype)
    stored = chunk_kda_fwd(*inputs, initial_state=states, disable_recompute=True, storage_dtype=dtype)
    made = chain(inputs, stored, cotangents, initial_state=states, storage_dtype=dtype)
    plain = chain(inputs, stored, cotangents, initial_state=states)
    for name, x in made.items():
        assert x.dtype == (dtype if name in ("dv", "dv_of_o", "dv_new", "dh") else np.float32), name
        ulps = relative_error(x, np.asarray(plain[name], np.float64)) / float(jnp.finfo(dtype).eps)
        assert ulps == 0 if name in ("dAqk", "ends_dq", "dq") else 0.02 <= ulps <= 3, (name, ulps)


@unoptimized
@pytest.mark.parametrize("gate", GATES)
def test_the_gate_backwards(gate):
    """Against its formulas in float64."""
    A_log, dt_bias, lower_bound = gate_arguments(*gate)
    rng = np.random.default_rng(3)
    g, dyg = rng.standard_normal((2, 2, T, HV, K))
    dg, dA, dbias = kda_gate_bwd(g, A_log, dt_bias, dyg, lower_bound)
    x = g + (0 if dt_bias is None else dt_bias.reshape(HV, K))
    rate = np.exp(np.zeros(HV) if A_log is None else A_log)[:, None]
    if lower_bound is None:
        expected = -rate * sigmoid(x) * dyg
        expected_A = (-rate * np.logaddexp(0, x) * dyg).sum((0, 1, 3))
    else:
        slope = lower_bound * sigmoid(rate * x) * sigmoid(-rate * x) * dyg
        expected, expected_A = rate * slope, (rate * x * slope).sum((0, 1, 3))
    np.testing.assert_allclose(dg, expected, rtol=1e-12)
    assert (dA is None) == (A_log is None)
    assert (dbias is None) == (dt_bias is None)
    if A_log is not None:
        np.testing.assert_allclose(dA, expected_A, rtol=1e-12)
    if dt_bias is not None:
        np.testing.assert_allclose(dbias, expected.sum((0, 1)).reshape(-1), rtol=1e-12)


@unoptimized
@pytest.mark.parametrize("op", [chunk_kda, pytest.param(fused_recurrent_kda, marks=slow)])
@pytest.mark.parametrize("value", [np.inf, pytest.param(-np.inf, marks=slow)])
@pytest.mark.parametrize("raw", ["softplus", *(pytest.param(x, marks=slow) for x in ("sigmoid", "beta"))])
def test_infinite_raw_inputs(op, value, raw):
    """A raw gate or beta of either infinity has the gradients of one of 1e30, bit for bit, and so has
    `kda_gate_bwd`."""
    rng = np.random.default_rng(0)
    q, k, v, g = rng.standard_normal((4, 1, 3, 1, 2))
    beta, A_log, dt_bias = np.full((1, 3, 1), 0.5), np.zeros(1), np.zeros(2)
    lower_bound = -5.0 if raw == "sigmoid" else None
    options = dict(use_gate_in_kernel=True, lower_bound=lower_bound, use_beta_sigmoid_in_kernel=raw == "beta")

    def loss(g, beta, A_log, dt_bias):
        return jnp.sum(op(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, **options)[0] ** 2)

    def gradients(value):
        given = [g.copy(), beta.copy()]
        given[raw == "beta"][0, 1, 0] = value if raw == "beta" else (value, g[0, 1, 0, 1])
        gate = kda_gate_bwd(given[0], A_log, dt_bias, np.ones_like(g), lower_bound)
        return *jax.grad(loss, (0, 1, 2, 3))(*given, A_log, dt_bias), *gate

    for x, y in zip(gradients(value), gradients(np.sign(value) * 1e30), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, y)


@unoptimized
def test_what_is_stored_is_what_is_read():
    """In float16, dh0 of a single chunk is made of dv as it is returned, and dv of dh as it is returned: to
    1e-6, where what is not rounded is 1e-4 off."""
    rng = np.random.default_rng(0)
    q, k, w, do, dv = (rng.standard_normal((1, 40, HV, K)).astype(np.float16) for _ in range(5))
    gk, dht = -0.1 * np.ones((1, 40, HV, K), np.float32).cumsum(1), rng.standard_normal((1, HV, K, K))
    dht = dht.astype(np.float32)
    dh, dh0, made = chunk_gated_delta_rule_bwd_dhu(
        q, k, w, do, dv, gk=gk, h0=dht, dht=dht, scale=0.5, storage_dtype=np.float16
    )
    q, k, w, do, dv, stored, dh = (np.asarray(x, np.float64)[0] for x in (q, k, w, do, dv, made, dh))
    decay = np.exp2(np.float64(gk[0, -1]))[..., None]
    expected = decay * dht[0] + np.einsum("thk,thv->hkv", 0.5 * q, do) - np.einsum("thk,thv->hkv", w, stored)
    assert relative_error(dh0[0], expected) <= 1e-6
    exact = dv + np.einsum("thk,hkv->thv", k, dh[0])
    assert np.mean(stored == exact.astype(np.float16)) >= 0.99


@unoptimized
def test_what_lies_above_the_diagonal_is_not_read():
    """FLA leaves it unwritten."""
    inputs, _, (d_o, _), _ = case()
    fields = chunk_kda_fwd(*inputs, disable_recompute=True)
    above = np.arange(T)[:, None] % 64 < np.arange(64)  # of the rows of each chunk
    Aqk = np.where(above[None, :, None], np.nan, fields.Aqk)
    q, k = inputs[:2]
    for x, y in zip(*(chunk_kda_bwd_dAv(q, k, fields.v_new, d_o, A) for A in (Aqk, fields.Aqk)), strict=True):
        np.testing.assert_array_equal(x, y)
