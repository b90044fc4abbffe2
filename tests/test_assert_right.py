"""`assert_right` passes what is right for any inputs, reports what is off, and refuses bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tops.cpu.kda as kda
from tops.cpu.kda.testing import CATALOGUE, assert_right

pytestmark = pytest.mark.unoptimized
slow = pytest.mark.slow


def call(name, dtype=np.float32):
    """The tokens and the options of a call of the catalogue's inputs, but not of its options."""
    case = CATALOGUE[name]
    inputs = case.inputs(dtype)
    tokens = [inputs.pop(name) for name in ("q", "k", "v", "g", "beta")]
    return tokens, inputs | case.options(False)


@pytest.mark.parametrize(
    ("name", "dtype", "changed"),
    [
        ("packed", "float32", dict(use_qk_l2norm_in_kernel=True)),
        pytest.param("dense", "bfloat16", dict(use_beta_sigmoid_in_kernel=True), marks=slow),
        pytest.param("state_v_first", "float64", dict(chunk_size=32), marks=slow),
        pytest.param("sigmoid_batch", "float32", dict(use_qk_l2norm_in_kernel=True), marks=slow),
    ],
)
def test_right_and_wrong_results(name, dtype, changed):
    """Of options in combinations that the catalogue does not have. One element off by 1 % is a failure."""
    tokens, options = call(name, jnp.dtype(dtype))
    options |= changed
    o, final_state = kda.chunk_kda(*tokens, **options)
    assert_right((o, final_state), *tokens, **options)
    assert_right(np.asarray(o), *tokens, **options)
    wrong = np.array(o)
    i = np.unravel_index(np.argmax(np.abs(wrong.astype(np.float64))), wrong.shape)
    wrong[i] = 1.01 * wrong[i].astype(np.float64) + 0.01
    with pytest.raises(AssertionError, match=r"NOT OK: the kernel, 1 of 2 tensors") as failure:
        assert_right((wrong, final_state), *tokens, **options)
    if "cu_seqlens" not in options:
        assert f"token {i[1]}, head {i[2]}" in str(failure.value)


@slow
def test_the_fields_of_the_forward_name_the_stage():
    tokens, options = call("dense")
    made = kda.chunk_kda_fwd(*tokens, **options, disable_recompute=True)
    assert_right(made, *tokens, **options)
    with pytest.raises(AssertionError, match="the first bad stage is 2 WY"):
        assert_right(made._replace(w=-made.w), *tokens, **options)


@slow
@pytest.mark.parametrize("states", [True, pytest.param(False, marks=pytest.mark.long)])
def test_gradients(states):
    """With the cotangent of the final state and the initial state's gradient, and without."""
    tokens, options = call("dense")
    if not states:
        options = {}
    state = options.pop("initial_state", None)
    cotangents = CATALOGUE["dense"].cotangents()
    if not states:
        del cotangents["dht"]

    def op(q, k, v, g, beta, initial_state):
        made = kda.chunk_kda(q, k, v, g, beta, initial_state=initial_state, **options)
        return made if states else made[0]

    pulled = jax.vjp(op, *tokens, state)[1](tuple(cotangents.values()) if states else cotangents["do"])
    names = ("dq", "dk", "dv", "dg", "dbeta", *["d_initial_state"] * states)
    gradients = dict(zip(names, pulled, strict=False))
    given = options | cotangents | (dict(initial_state=state) if states else {})
    assert_right(gradients, *tokens, **given)
    with pytest.raises(AssertionError, match=r"call: dbeta \(8 intra backwards\) errs"):
        assert_right(gradients | dict(dbeta=0.5 * gradients["dbeta"]), *tokens, **given)


@slow
def test_what_is_not_read_and_what_is_implied():
    """The state that a result holds needs no flag, and a gate's parameters without the gate are not read."""
    tokens, _ = call("dense")
    o, final_state = kda.chunk_kda(*tokens, output_final_state=True)
    assert_right((o, final_state), *tokens)
    assert_right(o, *tokens, A_log=np.zeros(4, np.float32), lower_bound=-5.0)
    assert_right(o, *tokens, scale=np.array(32**-0.5), chunk_size=np.int64(64))


def test_bad_input():
    tokens, _ = call("dense")
    o, few = np.zeros_like(tokens[2]), "o, final_state, g, .*"
    for message, result, more in (
        (r"options: expected some of initial_state, A_log, .*, got 'chunk'", o, dict(chunk=64)),
        (r"chunk_size: expected one of \(16, 32, 64, 128\), got 7", o, dict(chunk_size=7)),
        (rf"result: expected some of {few}, got NoneType", None, {}),
        (rf"result: expected some of {few}, got \['O'\]", dict(O=o), {}),
        (rf"result: expected some of {few}, got \['dq'\]; gradients are judged with do", dict(dq=o), {}),
        (r"result: expected a dict of some of dv, .*, got tuple", (o,), dict(do=o)),
        (r"result: expected a dict of some of .*, got \['dA_log'\]", dict(dA_log=o), dict(do=o)),
        (r"do: expected the shape \(2, 150, 4, 24\), got \(24,\)", dict(dq=o), dict(do=o[0, 0, 0])),
        (r"dht: expected do beside it, the cotangent of o, got None", o, dict(dht=o)),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            assert_right(result, *tokens, **more)
