"""Gradients through the chunked ops, against autodiff of the token recurrence in float64.

The judge is `naive_recurrent_kda` with activations written here; finite differences of it, which know no
autodiff, judge the judge. A gradient is a vjp: one cotangent for o and one for the final state.

There are three layouts: a dense batch whose last chunk is short, a packed one, and whole chunks, of which
nothing is selected. The gradients are shown of all three, what follows from them of one.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import REGIMES, draw
from jax.test_util import check_grads
from oracle import relative_error

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, naive_recurrent_kda

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
T, H = 150, 2
CU_SEQLENS = np.array([0, 70, 70, 71, 140], np.int32)  # an empty sequence, one of one token, 10 of padding
LAYOUTS = ("dense", "packed", "whole")
slow, unoptimized = pytest.mark.slow, pytest.mark.unoptimized


def case(regime="logsigmoid", layout="dense", HV=H, dtype=np.float64, T=T, B=1, seed=0):
    """(the arguments to differentiate, the options, the cotangents of o and the final state)."""
    packed = layout == "packed"
    K, V = (24, 20) if layout == "whole" else (16, 24)
    T = T // 64 * 64 if layout == "whole" else T
    inputs = draw(regime, B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype, seed=seed)
    rng = np.random.default_rng(seed + 1)
    N = len(CU_SEQLENS) - 1 if packed else B
    state, d_state = rng.standard_normal((2, N, HV, K, V)).astype(np.float32).astype(dtype)
    d_o = rng.standard_normal((B, T, HV, V)).astype(np.float32).astype(dtype)
    arguments = dict(zip(NAMES, (*inputs, state), strict=True))
    return arguments, dict(cu_seqlens=CU_SEQLENS) if packed else {}, (d_o, d_state)


# One compilation serves all regimes and packings of the same shapes and flags.
@partial(jax.jit, static_argnames=("op", "flags"))
def vjp(op, arguments, cotangents, flags, options):
    def results(arguments):
        return op(**arguments, output_final_state=True, **dict(flags), **options)[:2]

    return jax.vjp(results, arguments)[1](cotangents)[0]


def gradient(op, arguments, options, cotangents, **flags):
    """{argument: cotangent}, all finite."""
    made = vjp(op, arguments, cotangents, tuple(flags.items()), options)
    for name, x in made.items():
        assert np.isfinite(x).all(), name
    return {name: np.asarray(x) for name, x in made.items()}


def widened(arguments):
    return {name: x.astype(np.float64) for name, x in arguments.items()}


def errors(made, truth):
    """Relative errors; where the true gradient is 0, so is what was made."""
    for name, x in truth.items():
        assert x.any() or not made[name].any(), name
    return {name: relative_error(made[name], x) for name, x in truth.items() if x.any()}


@unoptimized
@pytest.mark.parametrize("chunk_size", [32, *(pytest.param(C, marks=slow) for C in (16, 64))])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("regime", REGIMES)
def test_float64(regime, layout, chunk_size):
    """The forward's own bounds, which leave two digits to rounding."""
    arguments, options, cotangents = case(regime, layout)
    truth = gradient(naive_recurrent_kda, arguments, options, cotangents)
    bound = 1e-11 if regime == "equal_keys" else 1e-13
    made = gradient(chunk_kda, arguments, options, cotangents, chunk_size=chunk_size)
    for name, error in errors(made, truth).items():
        assert error <= bound, name


@pytest.mark.parametrize("regime", REGIMES)
def test_float32(regime):
    """Within 10 times the error of the float32 recurrence's own gradient."""
    arguments, options, cotangents = case(regime, "whole", dtype=np.float32, T=576)
    truth = gradient(naive_recurrent_kda, widened(arguments), options, tuple(map(np.float64, cotangents)))
    recurrent = errors(gradient(naive_recurrent_kda, arguments, options, cotangents), truth)
    chunked = errors(gradient(chunk_kda, arguments, options, cotangents), truth)
    for name, error in chunked.items():
        assert error <= 10 * recurrent[name], (name, error, recurrent[name])


def l2norm(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def activated(gate, beta_scale, turned):
    """`naive_recurrent_kda` of raw arguments: the options of `chunk_kda`, written apart."""

    def op(q, k, v, g, beta, initial_state, A_log, dt_bias, **options):
        g = g + dt_bias.reshape(g.shape[-2:])
        rate = jnp.exp(A_log)[:, None]
        g = -rate * jnp.log1p(jnp.exp(g)) if gate is None else gate / (1 + jnp.exp(-rate * g))
        beta = beta_scale / (1 + jnp.exp(-beta))
        state = initial_state.swapaxes(2, 3) if turned else initial_state
        o, final_state = naive_recurrent_kda(l2norm(q), l2norm(k), v, g, beta, None, state, **options)
        return o, final_state.swapaxes(2, 3) if turned else final_state

    return op


@unoptimized
@pytest.mark.parametrize(
    ("layout", "G", "lower_bound", "neg_eigval", "turned"),
    [
        ("packed", 2, None, True, True),
        pytest.param("dense", 2, -5.0, False, False, marks=slow),
        pytest.param("whole", 1, None, True, False, marks=slow),
    ],
)
def test_options(layout, G, lower_bound, neg_eigval, turned):
    """Every activation, grouped value heads, states first or last, with respect to A_log and dt_bias too."""
    arguments, options, cotangents = case(layout=layout, HV=G * H)
    K = arguments["q"].shape[-1]
    rng = np.random.default_rng(2)
    arguments |= dict(A_log=0.5 * rng.standard_normal(G * H), dt_bias=rng.standard_normal(G * H * K))
    arguments["g"], arguments["beta"] = (rng.standard_normal(arguments[x].shape) for x in ("g", "beta"))
    arguments["k"] = 2 * arguments["k"]
    arguments["k"][:, 5:20] = 0  # zero keys, whose norm has no gradient without its epsilon
    if turned:
        arguments["initial_state"] = arguments["initial_state"].swapaxes(2, 3)
        cotangents = cotangents[0], cotangents[1].swapaxes(2, 3)
    flags = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
    flags |= dict(lower_bound=lower_bound, allow_neg_eigval=neg_eigval, state_v_first=turned)
    op = activated(lower_bound, 2.0 if neg_eigval else 1.0, turned)
    truth = gradient(op, arguments, options, cotangents)
    made = gradient(chunk_kda, arguments, options, cotangents, **flags)
    assert set(made) == set(truth)
    for name, error in errors(made, truth).items():
        assert error <= 1e-11, name


@unoptimized
def test_the_judge_by_finite_differences():
    """Central differences of the recurrence along random directions. With steps of 1e-5 their own error is
    1e-10 by curvature, and 1e-10 by rounding."""
    arguments, options, cotangents = case(layout="packed")
    rng = np.random.default_rng(3)
    directions = {name: rng.standard_normal(x.shape) for name, x in arguments.items()}

    @jax.jit
    def loss(arguments):
        results = naive_recurrent_kda(**arguments, output_final_state=True, **options)
        return sum(jnp.sum(x * y) for x, y in zip(results, cotangents, strict=True))

    truth = gradient(naive_recurrent_kda, arguments, options, cotangents)
    for name, direction in directions.items():
        step = 1e-5 * direction
        above, below = (loss(arguments | {name: arguments[name] + x}) for x in (step, -step))
        slope = np.sum(truth[name] * direction)
        assert abs((above - below) / 2e-5 - slope) <= 1e-7 * np.linalg.norm(truth[name]), name


@unoptimized
@slow
def test_check_grads_in_both_modes():
    """JAX's own finite differences, with its tolerance for float64."""
    arguments, options, _ = case(layout="packed")

    def op(arguments):
        return chunk_kda(**arguments, output_final_state=True, chunk_size=32, **options)

    check_grads(jax.jit(op), (arguments,), order=1, modes=("fwd", "rev"))


@unoptimized
@pytest.mark.parametrize(
    ("layout", "T", "names"),
    [
        pytest.param("dense", 40, NAMES, marks=slow),
        ("whole", 64, ["beta"]),
    ],
)
def test_second_order(layout, T, names):
    """The gradient of a gradient, within the first's bound.

    A rule that leaves out what its arguments share would be wrong here. Of beta alone it compiles in a third
    of the time, and sees the triangle of a chunk, which beta is in, and what beta writes.
    """
    arguments, _, (d_o, d_state) = case(layout=layout, T=T)
    rng = np.random.default_rng(4)
    directions = {name: rng.standard_normal(arguments[name].shape) for name in names}

    def along(op):
        def loss(wanted):
            o, final_state = op(**arguments | wanted, output_final_state=True)
            return jnp.sum(jnp.sin(o) * d_o) + jnp.sum(jnp.sin(final_state) * d_state)

        def slope(wanted):
            return sum(jnp.sum(x * directions[name]) for name, x in jax.grad(loss)(wanted).items())

        return jax.jit(jax.grad(slope))({name: arguments[name] for name in names})

    truth = along(naive_recurrent_kda)
    for name, error in errors(along(partial(chunk_kda, chunk_size=16)), truth).items():
        assert error <= 1e-13, name


@unoptimized
@slow
def test_a_gradient_of_a_tangent():
    """It is the tangent of the gradient, both in float64."""
    arguments, options, (d_o, d_state) = case(layout="packed")
    rng = np.random.default_rng(5)
    tangents = {name: rng.standard_normal(x.shape) for name, x in arguments.items()}

    def loss(arguments):
        o, final_state = chunk_kda(**arguments, output_final_state=True, **options)
        return jnp.sum(jnp.sin(o) * d_o) + jnp.sum(jnp.sin(final_state) * d_state)

    made = jax.jit(jax.grad(lambda x: jax.jvp(loss, (x,), (tangents,))[1]))(arguments)
    truth = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (tangents,))[1])(arguments)
    for name, error in errors(made, truth).items():
        assert error <= 1e-13, name


@unoptimized
@slow
def test_o_and_state_of_chunk_kda_fwd():
    """The gradient through them is `chunk_kda`'s, though it goes through the plain scan."""
    arguments, options, cotangents = case("weak", "packed")
    truth = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)

    def o_and_state(**arguments):
        made = chunk_kda_fwd(**arguments)
        return made.o, made.final_state

    made = gradient(o_and_state, arguments, options, cotangents, chunk_size=32)
    for name, error in errors(made, truth).items():
        assert error <= 1e-11, name


def every_field(**arguments):
    return chunk_kda_fwd(**arguments, disable_recompute=True)._replace(initial_state=None)


def with_states(**arguments):
    return chunk_kda(**arguments, return_intermediate_states=True)


@unoptimized
@pytest.mark.parametrize(
    ("op", "layout"),
    [
        (with_states, "packed"),
        pytest.param(every_field, "whole", marks=slow),
    ],
)
def test_of_every_result(op, layout):
    """Reverse mode along cotangents is forward mode along tangents, of all fields, and of h beside o."""
    arguments, options, _ = case("weak", layout)

    def results(arguments):
        return op(**arguments, output_final_state=True, chunk_size=32, **options)

    rng = np.random.default_rng(4)
    direction = {name: rng.standard_normal(x.shape) for name, x in arguments.items()}
    made, pushed = jax.jit(lambda x, dx: jax.jvp(results, (x,), (dx,)))(arguments, direction)
    cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape), made)
    (pulled,) = jax.jit(lambda x, ct: jax.vjp(results, x)[1](ct))(arguments, cotangents)
    forward = sum(
        np.sum(x * y) for x, y in zip(jax.tree.leaves(pushed), jax.tree.leaves(cotangents), strict=True)
    )
    reverse = sum(np.sum(pulled[name] * direction[name]) for name in NAMES)
    assert abs(forward - reverse) <= 1e-11 * sum(np.linalg.norm(pulled[name]) for name in NAMES)


@unoptimized
def test_storage_dtype_rounds_a_gradient_too():
    """By a few of its steps, which add up over the products that a gradient takes; and not by none."""
    arguments, options, cotangents = case("logsigmoid", "whole")
    flags = dict(chunk_size=32)
    exact = gradient(chunk_kda, arguments, options, cotangents, **flags)
    rounded = gradient(chunk_kda, arguments, options, cotangents, **flags, storage_dtype=np.dtype(np.float16))
    step = float(np.finfo(np.float16).eps)
    for name, error in errors(rounded, exact).items():
        assert step / 100 <= error <= 4 * step, name


@unoptimized
@pytest.mark.parametrize(
    ("layout", "dtype", "length", "flags"),
    [
        ("whole", np.float64, T, dict(chunk_size=32)),
        pytest.param("dense", np.float32, T, dict(use_qk_l2norm_in_kernel=True), marks=slow),
        pytest.param("dense", np.float32, 1, {}, marks=slow),
    ],
)
@pytest.mark.parametrize("gate", [-1000.0, -np.inf])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_finite_everywhere(beta, gate, layout, dtype, length, flags):
    """Hard gates, extreme betas, zero keys, one token; and a gate of -inf has gradient 0."""
    arguments, options, (d_o, d_state) = case(layout=layout, dtype=dtype)
    arguments["g"][:, ::3, :, ::2] = gate
    arguments["beta"][:] = beta
    arguments["k"][:, 2::5] = 0
    short = {name: x if name == "initial_state" else x[:, :length] for name, x in arguments.items()}
    made = gradient(chunk_kda, short, options, (d_o[:, :length], d_state), **flags)
    assert not made["g"][np.isinf(short["g"])].any()


@unoptimized
@slow
@pytest.mark.parametrize(
    "shape",
    [
        dict(K=17, V=1, B=2, HV=2),
        dict(K=8, V=8),
        dict(K=32, V=32, T=32),
        dict(K=33, V=16),
        dict(K=16, V=16, gate=np.float32),
    ],
    ids=str,
)
def test_every_shape_of_whole_chunks(shape):
    """In chunks of 32, from no initial state. Of a float32 g the truth is its widened values'."""
    B, T, HV, K, V = (shape.get(name, default) for name, default in dict(B=1, T=64, HV=1, K=0, V=0).items())
    inputs = draw("logsigmoid", B=B, T=T, H=1, HV=HV, K=K, V=V, dtype=np.float64, seed=0)
    arguments = dict(zip(NAMES[:5], inputs, strict=True))
    arguments["g"] = arguments["g"].astype(shape.get("gate", np.float64))
    rng = np.random.default_rng(1)
    cotangents = rng.standard_normal((B, T, HV, V)), rng.standard_normal((B, HV, K, V))
    truth = gradient(naive_recurrent_kda, widened(arguments), {}, cotangents)
    made = gradient(chunk_kda, arguments, {}, cotangents, chunk_size=32)
    for name, error in errors(made, truth).items():
        assert error <= (1e-7 if arguments[name].dtype == np.float32 else 1e-13), name


@partial(jax.jit, static_argnames=("names", "beside"))
def pulled(names, beside, arguments, cotangents):
    """The gradients by some arguments alone, beside the results or not."""

    def op(wanted):
        return chunk_kda(**arguments | wanted, output_final_state=True, chunk_size=32)

    results, pull = jax.vjp(op, {name: arguments[name] for name in names})
    return pull(cotangents)[0], results if beside else None


@unoptimized
@slow
@pytest.mark.parametrize(("name", "beside"), [("q", False), ("g", False), ("beta", True)])
def test_of_one_argument(name, beside):
    """What is asked for alone, beside the results or not, is what it is among the others."""
    arguments, _, cotangents = case(layout="whole", T=64)
    alone, truth = (pulled(names, beside, arguments, cotangents)[0][name] for names in ((name,), NAMES))
    np.testing.assert_allclose(alone, truth, rtol=0, atol=1e-13 * np.abs(truth).max())


@unoptimized
def test_what_nobody_wants_costs_nothing():
    """Stage 1 is half of what the products of a chunk's gradient cost, and v has no part in it."""
    arguments, _, _ = case(layout="whole", T=64)

    def flops(names):
        def loss(wanted):
            return jnp.sum(chunk_kda(**arguments | wanted, chunk_size=32)[0])

        lowered = jax.jit(jax.grad(loss)).lower({name: arguments[name] for name in names})
        return lowered.cost_analysis()["flops"]

    assert flops(["v"]) <= flops(NAMES) / 2


@unoptimized
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_betas(layout):
    """The gradient with respect to a beta of 0, of which nothing is written, or of next to nothing."""
    arguments, options, cotangents = case(layout=layout)
    arguments["beta"][:, ::3], arguments["beta"][:, 1::3] = 0, 1e-300
    truth = gradient(naive_recurrent_kda, arguments, options, cotangents)
    made = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)
    for name, error in errors(made, truth).items():
        assert error <= 1e-13, name


@unoptimized
@pytest.mark.parametrize("layout", ["packed", "whole"])
def test_infinite_gates_everywhere(layout):
    arguments, options, cotangents = case(layout=layout)
    arguments["g"][:] = -np.inf
    made = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)
    assert not made["g"].any()


@unoptimized
def test_padding_gets_exactly_zero():
    """Even where it holds NaN, and where NaN is sent back to it."""
    arguments, options, cotangents = case(layout="packed")
    clean = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)
    for x in (*(arguments[name] for name in NAMES[:5]), cotangents[0]):
        x[:, CU_SEQLENS[-1] :] = np.nan
    made = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)
    for name in NAMES:
        np.testing.assert_array_equal(made[name], clean[name])
    for name in NAMES[:5]:
        assert not made[name][:, CU_SEQLENS[-1] :].any()


@unoptimized
@pytest.mark.parametrize("poisoned", [0, 2, 3])
def test_no_gradient_between_sequences(poisoned):
    """NaN in every argument and cotangent of one sequence: the gradients of the others keep their bits, and
    a cotangent of one sequence alone moves that sequence alone."""
    arguments, options, cotangents = case(layout="packed")
    span = slice(CU_SEQLENS[poisoned], CU_SEQLENS[poisoned + 1])
    clean = gradient(chunk_kda, arguments, options, cotangents, chunk_size=32)
    own = jax.tree.map(np.zeros_like, cotangents)
    own[0][:, span], own[1][poisoned] = cotangents[0][:, span], cotangents[1][poisoned]
    alone = gradient(chunk_kda, arguments, options, own, chunk_size=32)
    for x in (*(arguments[name] for name in NAMES[:5]), cotangents[0]):
        x[:, span] = np.nan
    arguments["initial_state"][poisoned] = cotangents[1][poisoned] = np.nan
    made = vjp(chunk_kda, arguments, cotangents, (("chunk_size", 32),), options)
    for name in NAMES:
        axis, where = (0, poisoned) if name == "initial_state" else (1, span)
        rest = np.delete(np.arange(clean[name].shape[axis]), where)
        got = np.take(np.asarray(made[name]), rest, axis)
        np.testing.assert_array_equal(got, np.take(clean[name], rest, axis))
        assert not np.take(alone[name], rest, axis).any()


@unoptimized
@slow
def test_a_later_block_does_not_reach_an_earlier_small_beta():
    """Of a token without beta, its error is kept: nothing of a NaN that a later block writes is in it."""
    arguments, _, _ = case(layout="whole", T=64)
    arguments["beta"][:, 3] = 0
    arguments["v"][:, 40] = np.nan

    @jax.jit
    def value_and_grad(arguments):
        return jax.value_and_grad(lambda x: chunk_kda(**x)[0][:, :32].sum())(arguments)

    for name, x in value_and_grad(arguments)[1].items():
        assert np.isfinite(x if name == "initial_state" else x[:, :32]).all(), name


@unoptimized
@slow
def test_vmap_of_gradients():
    """A batch of gradients is the gradients of the batch's members."""
    first, options, cotangents = case(layout="packed")
    second, _, _ = case(layout="packed", seed=5)
    both = {name: np.stack([first[name], second[name]]) for name in NAMES}

    def loss(arguments):
        o, final_state = chunk_kda(**arguments, output_final_state=True, chunk_size=32, **options)
        return jnp.sum(o * cotangents[0]) + jnp.sum(final_state * cotangents[1])

    mapped = jax.jit(jax.vmap(jax.grad(loss)))(both)
    for i, member in enumerate((first, second)):
        truth = gradient(chunk_kda, member, options, cotangents, chunk_size=32)
        for name, error in errors({name: x[i] for name, x in mapped.items()}, truth).items():
            assert error <= 1e-11, name


@slow
def test_memory_does_not_hold_the_chunks(compiled_anew):
    """Beyond inputs and gradients: a state a chunk, and a few arrays of the length of o. What the stages make
    of a chunk is 20 times its state here, and an array of T tokens a chunk would be 64 times."""
    T, H, K = 4096, 2, 64
    arguments = dict(zip(NAMES, draw(T=64, H=H, K=K), strict=False))
    arguments = {name: jax.ShapeDtypeStruct((1, T, *x.shape[2:]), x.dtype) for name, x in arguments.items()}
    states, o = (T // 64 + 1) * H * K * K * 4, T * H * K * 4
    cu_seqlens = np.array([0, 1000, T])
    loss = jax.jit(jax.grad(lambda x: jnp.sum(chunk_kda(**x, cu_seqlens=cu_seqlens)[0] ** 2)))
    temporaries = loss.lower(arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporaries <= states + 8 * o, (temporaries, states, o)


@slow
def test_what_a_gradient_keeps(compiled_anew):
    """The state that enters each chunk and the error of each token. Nothing else grows with T: the rest is 24
    times the q of a chunk here, and an array of T tokens would be 64 times that."""
    H, K = 2, 64

    def temporaries(T):
        arguments = dict(zip(NAMES, draw(T=64, H=H, K=K), strict=False))
        arguments = {
            name: jax.ShapeDtypeStruct((1, T, *x.shape[2:]), x.dtype) for name, x in arguments.items()
        }
        cotangents = jax.ShapeDtypeStruct((1, T, H, K), np.float32), np.ones((1, H, K, K), np.float32)
        compiled = vjp.lower(chunk_kda, arguments, cotangents, (), {}).compile()
        kept = (T // 64 * H * K * K + T * H * K) * 4
        return compiled.memory_analysis().temp_size_in_bytes - kept

    few, many = temporaries(2048), temporaries(4096)
    assert many - few <= 1e4, (few, many)
    assert many <= 40 * 64 * H * K * 4, many


@slow
def test_no_chunk_copies_the_states_of_a_pack(compiled_anew):
    """XLA updates the states and their gradient in place: all of them it copies outside the scans alone."""
    arguments, options, cotangents = case(layout="packed", dtype=np.float32)
    compiled = vjp.lower(chunk_kda, arguments, cotangents, (), options).compile().as_text()
    shape = ",".join(map(str, cotangents[1].shape))
    copies, computation = [], None
    for line in compiled.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        elif re.search(rf"= f32\[{shape}\]\S* copy\(", line):
            copies.append(computation)
    assert set(copies) <= {"ENTRY"}, copies


@unoptimized
def test_chunks_are_put_in_their_places_with_no_scatter():
    """XLA adds the rows of a scatter one after the other."""
    arguments, options, cotangents = case(layout="packed")
    assert "scatter" not in vjp.lower(chunk_kda, arguments, cotangents, (), options).as_text()
