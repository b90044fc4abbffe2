"""FLA's contract: every field, every option, every stage on its own."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from inputs import draw
from oracle import recurrence, relative_error, stages

from tops.cpu.kda import (
    chunk_gated_delta_rule_fwd_h,
    chunk_gla_fwd_o_gk,
    chunk_kda,
    chunk_kda_fwd,
    chunk_kda_fwd_intra,
    chunk_local_cumsum,
    fused_kda_gate,
    fused_recurrent_kda,
    kda_gate_chunk_cumsum,
    kda_gate_fwd,
    naive_kda_gate,
    naive_kda_lowerbound_gate,
    prepare_chunk_offsets,
    prepare_lens,
    recompute_w_u_fwd,
)

pytestmark = pytest.mark.unoptimized
T, H, HV, K, V = 150, 2, 4, 16, 12
CU_SEQLENS = np.array([0, 70, 70, 71, 140])  # an empty sequence, one token, padding
STORED = ("Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h")


def case(packed=False, dtype=np.float64, regime="logsigmoid"):
    inputs = draw(regime, B=1 if packed else 2, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype)
    N = len(CU_SEQLENS) - 1 if packed else 2
    states = np.random.default_rng(1).standard_normal((N, HV, K, V)).astype(np.result_type(dtype, np.float32))
    return inputs, dict(initial_state=states, cu_seqlens=CU_SEQLENS if packed else None)


@pytest.mark.parametrize("chunk_size", [64, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
def test_every_field_is_what_it_is_defined_as(packed, chunk_size):
    """Against the definitions in float64, chunk by chunk: rounding alone lies between. Zero elsewhere."""
    inputs, options = case(packed)
    fields = chunk_kda_fwd(*inputs, **options, chunk_size=chunk_size, disable_recompute=True)
    spans = [(0, *span) for span in itertools.pairwise(CU_SEQLENS)]
    spans = spans if packed else [(row, 0, T) for row in range(2)]
    expected = {name: np.zeros(getattr(fields, name).shape) for name in ("o", "g", *STORED)}
    for head in range(HV):
        i = 0
        for n, (row, start, end) in enumerate(spans):
            i = i if packed else 0
            q, k = (x[row, start:end, head // (HV // H)] for x in inputs[:2])
            v, g, beta = (x[row, start:end, head] for x in inputs[2:])
            chunks = stages(q, k, v, g, beta, K**-0.5, options["initial_state"][n, head], chunk_size)
            for c, chunk in enumerate(chunks):
                expected["h"][row, i, head] = chunk.pop("h")
                del chunk["L"]
                first = start + c * chunk_size
                for name, x in chunk.items():
                    expected[name][row, first : first + len(x), head, : x.shape[1]] = x
                i += 1
    for name, x in expected.items():
        np.testing.assert_allclose(getattr(fields, name), x, rtol=0, atol=1e-12, err_msg=name)
        assert not np.asarray(getattr(fields, name))[x == 0].any(), name


@pytest.mark.parametrize("use_gate_in_kernel", [False, True])
@pytest.mark.parametrize("return_intermediate_states", [False, True])
@pytest.mark.parametrize("disable_recompute", [False, True])
def test_none_where_fla_returns_none(disable_recompute, return_intermediate_states, use_gate_in_kernel):
    inputs, options = case()
    gate = dict(use_gate_in_kernel=True, A_log=np.zeros(HV)) if use_gate_in_kernel else {}
    flags = dict(disable_recompute=disable_recompute, return_intermediate_states=return_intermediate_states)
    fields = jax.eval_shape(lambda: chunk_kda_fwd(*inputs, **options, **gate, **flags))
    none = {name for name, x in fields._asdict().items() if x is None}
    expected = {"final_state"}
    if not disable_recompute:
        expected |= {"w", "u", "qg", "kg", "v_new"}
        expected |= set() if return_intermediate_states else {"h"}
        expected |= {"g"} if use_gate_in_kernel else set()
    assert none == expected
    assert fields.initial_state.shape == options["initial_state"].shape


@pytest.mark.parametrize(
    ("dtype", "packed", "use_exp2", "state_v_first"),
    [
        pytest.param(np.float32, False, True, False, marks=pytest.mark.slow),
        (np.float32, True, True, True),
        pytest.param(np.float64, True, False, False, marks=pytest.mark.slow),
    ],
)
def test_stages_chained_by_hand(dtype, packed, use_exp2, state_v_first):
    """1e-6 and 1e-13: the stage ops see the gates only as cumulative sums, rounded at their own size."""
    bound = 1e-6 if dtype == np.float32 else 1e-13
    inputs, options = case(packed, dtype)
    q, k, v, _, beta = inputs
    if state_v_first:
        options["initial_state"] = options["initial_state"].swapaxes(2, 3)
    states = dict(initial_state=options.pop("initial_state"), output_final_state=True)
    fields = chunk_kda_fwd(*inputs, **options, **states, state_v_first=state_v_first, disable_recompute=True)
    gk = fields.g if use_exp2 else fields.g * dtype(np.log(2))
    unit = dict(use_exp2=use_exp2)
    w, u, qg, kg, Aqk, Akk = chunk_kda_fwd_intra(q, k, v, gk, beta, **options, **unit, disable_recompute=True)
    h, v_new, final_state = chunk_gated_delta_rule_fwd_h(
        kg, w, u, gk=gk, **options, **unit, **states, state_v_first=state_v_first
    )
    o = chunk_gla_fwd_o_gk(q, v_new, gk, Aqk, h, None, state_v_first, **options, **unit)
    chained = dict(w=w, u=u, qg=qg, kg=kg, Aqk=Aqk, Akk=Akk, h=h, v_new=v_new, final_state=final_state, o=o)
    wy = recompute_w_u_fwd(k, v, beta, Akk, gk=gk, q=q, **options, **unit)
    again = dict(zip(("w", "u", "qg", "kg"), wy, strict=True))
    for name, x in [*chained.items(), *again.items()]:
        assert x.dtype == getattr(fields, name).dtype
        assert relative_error(x, np.asarray(getattr(fields, name), np.float64)) <= bound, name


def test_the_output_stage_does_not_read_above_the_diagonal():
    (q, *_), _ = case()
    fields = chunk_kda_fwd(*case()[0], disable_recompute=True)
    A = np.array(fields.Aqk)
    above = np.arange(T)[:, None] % 64 < np.arange(64)  # of the rows of each chunk
    A[np.broadcast_to(above[None, :, None], A.shape)] = np.nan
    o, expected = (chunk_gla_fwd_o_gk(q, fields.v_new, fields.g, x, fields.h, None) for x in (A, fields.Aqk))
    np.testing.assert_array_equal(o, expected)


def test_a_beta_of_16_bits_rounds_its_product_with_k():
    """w of beta and k is w of 1 and the rounded product, to the bit. With a beta of float32 it is another."""
    (q, k, v, g, beta), options = case(packed=True, dtype=np.float16)
    beta = beta.astype(np.float16)
    fields = chunk_kda_fwd(q, k, v, g, beta, **options, storage_dtype=np.float16)
    k = np.repeat(k, HV // H, axis=2)

    def w(k, beta):
        given = dict(gk=fields.g, cu_seqlens=CU_SEQLENS, storage_dtype=np.float16)
        return recompute_w_u_fwd(k, v, beta, fields.Akk, **given)[0]

    np.testing.assert_array_equal(w(k, beta), w(beta[..., None] * k, np.ones_like(beta)))
    assert (np.asarray(w(k, beta)) != np.asarray(w(k, beta.astype(np.float32)))).any()


def test_optional_results_of_the_stages():
    inputs, _ = case()
    q, k, v, _, beta = inputs

    def stages(gk):
        w, u, qg, kg, _, Akk = chunk_kda_fwd_intra(q, k, v, gk, beta, use_exp2=False)
        assert qg is None
        assert recompute_w_u_fwd(k, v, beta, Akk, gk=gk, use_exp2=False)[2] is None
        _, v_new, final_state = chunk_gated_delta_rule_fwd_h(kg, w, u, gk=gk, save_new_value=False)
        assert v_new is None
        assert final_state is None

    jax.eval_shape(stages, inputs[3])


@pytest.mark.parametrize("packed", [False, True])
def test_scalar_gate_is_gated_deltanet(packed):
    """With one gate for all channels of a head, the state pass on k and g is the one on kg and gk."""
    (q, k, v, g, beta), options = case(packed)
    g = np.broadcast_to(g[..., :1], g.shape)
    fields = chunk_kda_fwd(q, k, v, g, beta, **options, disable_recompute=True, output_final_state=True)
    h, v_new, final_state = chunk_gated_delta_rule_fwd_h(
        k, fields.w, fields.u, g=fields.g[..., 0], output_final_state=True, **options
    )
    for name, x in dict(h=h, v_new=v_new, final_state=final_state).items():
        np.testing.assert_allclose(x, getattr(fields, name), rtol=0, atol=1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate_by_hand(g, A_log, dt_bias, lower_bound):
    g = g + (0 if dt_bias is None else dt_bias.reshape(g.shape[-2:]))
    if lower_bound is None:
        return -np.exp(A_log)[:, None] * np.logaddexp(0, g)
    return lower_bound * sigmoid(g if A_log is None else np.exp(A_log)[:, None] * g)


GATES = [
    (True, True, None),
    (True, False, None),
    (True, True, -5.0),
    (True, False, -2.0),
    (False, True, -5.0),
]


def gate_arguments(has_A, has_bias, lower_bound, dtype=np.float64):
    rng = np.random.default_rng(2)
    A_log, dt_bias = rng.standard_normal(HV).astype(dtype), rng.standard_normal(HV * K).astype(dtype)
    return A_log if has_A else None, dt_bias if has_bias else None, lower_bound


@pytest.mark.parametrize("gate", GATES)
def test_gates(gate):
    A_log, dt_bias, lower_bound = arguments = gate_arguments(*gate)
    g = np.random.default_rng(3).standard_normal((1, T, HV, K)) * 10
    expected = gate_by_hand(g, *arguments)
    for op in (kda_gate_fwd, fused_kda_gate):
        np.testing.assert_allclose(op(g, *arguments, np.float64), expected, rtol=1e-13)
    assert kda_gate_fwd(g, *arguments).dtype == np.float32
    naive = naive_kda_gate(g, A_log, dt_bias, np.float64) if lower_bound is None else None
    if naive is None:
        naive = naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound, np.float64)
    np.testing.assert_allclose(naive, expected, rtol=1e-13)
    options = dict(cu_seqlens=CU_SEQLENS, scale=0.5, output_dtype=np.float64)
    cumsum = kda_gate_chunk_cumsum(g, A_log, 32, dt_bias=dt_bias, lower_bound=lower_bound, **options)
    np.testing.assert_allclose(cumsum, chunk_local_cumsum(expected, 32, **options), rtol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ndim", [3, 4])
def test_chunk_local_cumsum(ndim, reverse):
    """Added in order, as NumPy does, bit for bit. And its gradient, the sums from the other end: of positive
    cotangents, so that nothing cancels."""
    g = np.random.default_rng(0).standard_normal((1, T, HV, K)[:ndim])

    def summed(x, reverse):
        made = np.zeros_like(x)
        for start, end in itertools.pairwise(CU_SEQLENS):
            for first in range(start, end, 16):
                rows = slice(first, min(first + 16, end))
                flip = slice(None, None, -1 if reverse else 1)
                made[:, rows] = (3 * x[:, rows][:, flip]).cumsum(axis=1)[:, flip]
        return made

    made, pull = jax.vjp(lambda g: chunk_local_cumsum(g, 16, reverse, 3.0, CU_SEQLENS, np.float64), g)
    np.testing.assert_array_equal(made, summed(g, reverse))
    np.testing.assert_allclose(pull(jnp.exp(g))[0], summed(np.exp(g), not reverse), rtol=1e-13)
    assert chunk_local_cumsum(g, 16).dtype == np.float32


@pytest.mark.parametrize(
    ("op", "neg", "gate"),
    [
        (chunk_kda, True, GATES[1]),
        (chunk_kda, False, GATES[2]),
        *(
            pytest.param(op, i % 2 == 1, gate, marks=pytest.mark.slow)
            for op in (chunk_kda, fused_recurrent_kda)
            for i, gate in enumerate(GATES)
            if op is fused_recurrent_kda or i not in (1, 2)
        ),
    ],
)
def test_in_kernel_activations_equal_activating_first(op, neg, gate):
    """float32, 1e-6: the activations are rounded once more when they are made outside."""
    (q, k, v, g, beta), options = case(packed=True, dtype=np.float32)
    A_log, dt_bias, lower_bound = gate_arguments(*gate, dtype=np.float32)
    q, k, g, beta = 3 * q, 2 * k, 10 * g + 5, 4 * beta - 2
    inside = op(
        *(q, k, v, g, beta),
        **options,
        **dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True),
        **dict(allow_neg_eigval=neg, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound),
        **dict(safe_gate=lower_bound is not None, output_final_state=True),
    )
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in np.float64([q, k]))
    g = gate_by_hand(np.float64(g), A_log, dt_bias, lower_bound)
    beta = (2 if neg else 1) * sigmoid(np.float64(beta))
    outside = op(*np.float32([q, k]), v, *map(np.float32, (g, beta)), **options, output_final_state=True)
    for x, y in zip(inside, outside, strict=True):
        assert relative_error(x, np.asarray(y, np.float64)) <= 1e-6


@pytest.mark.slow
def test_chunk_kda_returns_the_states_too():
    inputs, options = case(packed=True)
    fields = chunk_kda_fwd(*inputs, **options, return_intermediate_states=True)
    o, final_state, h = chunk_kda(*inputs, **options, return_intermediate_states=True)
    np.testing.assert_array_equal(o, fields.o)
    np.testing.assert_array_equal(h, fields.h)
    assert final_state is None


@pytest.mark.slow
@pytest.mark.parametrize("op", [chunk_kda, chunk_kda_fwd, fused_recurrent_kda])
def test_the_deprecated_name_of_state_v_first(op):
    inputs, options = case()
    options["initial_state"] = options["initial_state"].swapaxes(2, 3)
    expected = op(*inputs, **options, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="transpose_state_layout is deprecated"):
        found = op(*inputs, **options, output_final_state=True, transpose_state_layout=True)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("packed", "state_v_first"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
def test_fused_recurrent_equals_chunked(packed, state_v_first):
    inputs, options = case(packed)
    if state_v_first:
        options["initial_state"] = options["initial_state"].swapaxes(2, 3)
    options |= dict(output_final_state=True, state_v_first=state_v_first)
    for x, y in zip(fused_recurrent_kda(*inputs, **options), chunk_kda(*inputs, **options), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_decoding_goes_on_from_a_prefill(packed):
    """A prefill and then one token a call give what one long call gives: float64, 1e-12."""
    prefill, steps, N = 70, 5, 3
    inputs = draw(B=N, T=prefill + steps, H=H, HV=HV, K=K, V=V, dtype=np.float64)
    expected, expected_state = recurrence(*inputs)
    o, state = chunk_kda(*(x[:, :prefill] for x in inputs), output_final_state=True)
    outputs = [o]
    for t in range(prefill, prefill + steps):
        token = [x[:, t : t + 1] for x in inputs]
        if packed:  # [N, 1, ...] to [1, N, ...]
            token = [x.swapaxes(0, 1) for x in token]
        cu_seqlens = np.arange(N + 1) if packed else None
        o, state = fused_recurrent_kda(
            *token, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )
        outputs.append(jnp.swapaxes(o, 0, 1) if packed else o)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("storage_dtype", "packed"),
    [(np.float16, True), pytest.param(ml_dtypes.bfloat16, False, marks=pytest.mark.slow)],
)
def test_storage_dtype_rounds_what_fla_stores(packed, storage_dtype):
    """The fields come in that dtype, o moves by about its precision, and chaining the stages rounds alike."""
    inputs, options = case(packed, np.float32)
    options["storage_dtype"] = storage_dtype
    states = dict(initial_state=options.pop("initial_state"), output_final_state=True)
    fields = chunk_kda_fwd(*inputs, **options, **states, disable_recompute=True)
    for name in STORED:
        assert getattr(fields, name).dtype == storage_dtype, name
    assert fields.g.dtype == fields.final_state.dtype == fields.o.dtype == np.float32
    exact = chunk_kda_fwd(*inputs, cu_seqlens=options["cu_seqlens"], **states)
    step = float(jnp.finfo(storage_dtype).eps)
    assert step / 20 <= relative_error(fields.o, np.asarray(exact.o, np.float64)) <= step
    o, _ = chunk_kda(*inputs, **options, **states)
    np.testing.assert_array_equal(o, fields.o)

    q, k, v, _, beta = inputs
    w, u, qg, kg, Aqk, Akk = chunk_kda_fwd_intra(q, k, v, fields.g, beta, **options, disable_recompute=True)
    h, v_new, final_state = chunk_gated_delta_rule_fwd_h(kg, w, u, gk=fields.g, **options, **states)
    o = chunk_gla_fwd_o_gk(q, v_new, fields.g, Aqk, h, None, **options)
    chained = dict(w=w, u=u, qg=qg, kg=kg, Aqk=Aqk, Akk=Akk, h=h, v_new=v_new, final_state=final_state)
    for name, x in chained.items():
        assert relative_error(x, np.asarray(getattr(fields, name), np.float64)) <= step / 2, name
    assert relative_error(o.astype(np.float32), np.asarray(fields.o, np.float64)) <= step


def test_storage_dtype_rounds_the_normalised_q_and_k():
    """As rounding them by hand, but for float32's last bits, which may turn a rounding."""
    (q, k, v, g, beta), _ = case(dtype=np.float32)
    q, k = 3 * q, 2 * k
    inside, _ = chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, storage_dtype=np.float16)
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    rounded = (x.astype(np.float16).astype(np.float32) for x in (q, k))
    outside, _ = chunk_kda(*rounded, v, g, beta, storage_dtype=np.float16)
    unrounded, _ = chunk_kda(q, k, v, g, beta, storage_dtype=np.float16)
    expected = np.asarray(outside, np.float64)
    assert 4 * relative_error(inside, expected) <= relative_error(unrounded, expected)


def test_index_helpers():
    np.testing.assert_array_equal(prepare_lens(CU_SEQLENS), [70, 0, 1, 69])
    np.testing.assert_array_equal(prepare_chunk_offsets(CU_SEQLENS, 64), [0, 2, 2, 3, 5])
