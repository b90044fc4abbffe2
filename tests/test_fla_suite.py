"""The calls of `chunk_kda` in FLA's own suite: the same shapes, dtypes, options and tolerances.

`make test-long` computes every case but two. CI computes the small ones, and traces the calls of some
others: nothing is refused, and every result and gradient has its shape and dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fla_suite import (
    BF16,
    C32,
    F16,
    F32,
    KEEP,
    NEGATIVE,
    RAW,
    SAFE,
    UNIT,
    activated,
    assert_near,
    both,
    cases,
    drawn,
    gradients,
    recurrence,
    sequences,
    shapes,
    unit,
)

from tops.cpu.kda import chunk_kda, fused_recurrent_kda

pytestmark = [pytest.mark.unoptimized, pytest.mark.slow]

TURNED = dict(state_v_first=True)
# B, T, H, HV, D, dtype; how gates are drawn; the options.
DENSE = [
    ((1, 63, 1, 1, 64, F16), dict(), dict(scale=1) | SAFE),
    ((2, 500, 3, 3, 60, F16), dict(), dict(scale=1) | SAFE | KEEP),
    ((2, 1000, 3, 3, 64, F16), dict(zeros=0.5), dict(scale=0.1) | KEEP),
    ((3, 1024, 4, 4, 100, F16), dict(by=0.1), dict(scale=1)),
    ((4, 1024, 4, 4, 128, F16), dict(), dict(scale=0.1) | SAFE | KEEP),
    ((4, 1024, 4, 4, 128, F16), dict(), dict(scale=0.1) | SAFE | UNIT),
    ((2, 1500, 4, 4, 128, F16), dict(), dict(scale=0.1) | RAW | KEEP),
    ((4, 2048, 8, 8, 64, F16), dict(), dict(scale=0.1) | RAW | SAFE | KEEP),
    ((2, 1024, 2, 4, 64, F16), dict(), dict(scale=0.1)),
    ((2, 1024, 2, 8, 64, F16), dict(), dict(scale=0.1) | RAW),
    ((2, 1024, 4, 8, 128, F16), dict(), dict(scale=0.1) | RAW | UNIT),
    ((2, 160, 2, 4, 64, F16), dict(), dict(scale=0.1) | RAW | SAFE | KEEP | C32),
    ((2, 1024, 2, 4, 64, BF16), dict(), dict(scale=0.1) | RAW | SAFE | UNIT),
    ((2, 1024, 2, 4, 64, BF16), dict(), dict(scale=0.1) | RAW),
    ((2, 160, 2, 4, 64, BF16), dict(), dict(scale=0.1) | RAW | SAFE | KEEP | C32),
    ((2, 1024, 2, 8, 128, BF16), dict(), dict(scale=0.1) | RAW | UNIT),
]


def dense_arguments(sizes, options):
    return shapes(*sizes, parameters=("A_log", "dt_bias") if "use_gate_in_kernel" in options else None)


@pytest.mark.parametrize(("sizes", "gates", "options"), cases(DENSE, small=(0, 14)))
def test_chunk_kda(sizes, gates, options):
    """o and the final state to 0.005 of the recurrence's, gradients to 0.008, those of g and beta to 0.02."""
    given = drawn(dense_arguments(sizes, options), **gates)
    if "safe_gate" in options and "use_gate_in_kernel" not in options:
        given["g"] = given["g"].clip(-5, 0)

    def reference(q, k, v, g, beta, initial_state, **parameters):
        g = activated(g, **parameters, lower_bound=options.get("lower_bound")) if parameters else g
        return recurrence(unit(q), unit(k), v, g, beta, initial_state, options["scale"])

    def op(q, k, **given):
        q, k = (q, k) if "use_qk_l2norm_in_kernel" in options else (unit(q), unit(k))
        return chunk_kda(q, k, **given, output_final_state=True, **options)

    bounds = dict(o=0.005, final_state=0.005, g=0.02, beta=0.02, A_log=0.003)
    assert_near(gradients(op, given), gradients(reference, given), 0.008, **bounds)


# H, D; the part of the gates that is -1000, and where g is the log decay another part is 0; ends; options.
PACKED = [
    (4, 60, 0.1, [0, 15], RAW),
    (4, 64, 0.9, [0, 256, 500, 1000], RAW),
    (4, 128, 0.5, [0, 256, 500, 1000], dict()),
    (4, 100, 0.0, [0, 15, 100, 300, 1200, 2000], RAW),
    (4, 256, 0.0, [0, 100, 300, 1200, 3000, 4096], dict(safe_gate=True) | KEEP),
    (4, 60, 0.1, [0, 31, 96, 160], RAW | KEEP | C32),
]


def packed_arguments(H, D, ends, options):
    parameters = ("A_log", "dt_bias") if "use_gate_in_kernel" in options else None
    return shapes(1, ends[-1], H, H, D, F16, N=len(ends) - 1, parameters=parameters)


def packed_case(H, D, part, ends, options):
    """The arguments, the call and the reference. A_log is as checkpoints hold it, [1, 1, HV, 1]."""
    raw = "use_gate_in_kernel" in options
    gates = dict(resets=part) if raw else dict(zeros=part, resets=part)
    given = drawn(packed_arguments(H, D, ends, options), normal=("q", "k", "v"), **gates)
    given["k"] = np.asarray(unit(given["k"]))
    if "safe_gate" in options:
        given["g"] = given["g"].clip(-5, 0)
    if raw:
        given["A_log"] = np.log(np.random.default_rng(2).uniform(1, 16, (1, 1, H, 1))).astype(F32)
    packing = dict(cu_seqlens=np.array(ends), cu_seqlens_cpu=np.array(ends))

    def op(q, **given):
        return chunk_kda(unit(q), **given, output_final_state=True, **packing, **options)

    def reference(q, k, v, g, beta, initial_state, **parameters):
        g = activated(g, **parameters) if parameters else g
        return sequences(ends, unit(q), k, v, g, beta, initial_state)

    return given, op, reference


@pytest.mark.parametrize(("H", "D", "part", "ends", "options"), cases(PACKED, small=(5,)))
def test_packed(H, D, part, ends, options):
    """o and the final state to 0.005, gradients to 0.007 and 0.008, those of g and beta to 0.015."""
    given, op, reference = packed_case(H, D, part, ends, options)
    bounds = dict(o=0.005, final_state=0.005, k=0.008, g=0.015, beta=0.015, A_log=0.008, dt_bias=0.005)
    assert_near(gradients(op, given), gradients(reference, given), 0.007, **bounds)


PREFILL = [(4, 60, 0.1, [0, 8192], RAW), *PACKED[1:5]]


@pytest.mark.parametrize(("H", "D", "part", "ends", "options"), cases(PREFILL))
def test_prefill(H, D, part, ends, options):
    """The same without gradients."""
    given, op, reference = packed_case(H, D, part, ends, options)
    made, expected = (jax.jit(f)(**given) for f in (op, reference))
    assert_near(both(made), both(expected), 0.005)


V_FIRST = [(1, 63, 1, 64), (2, 500, 3, 60), (3, 1024, 4, 128), (4, 2048, 8, 64)]


@pytest.mark.parametrize(("B", "T", "H", "D"), cases(V_FIRST))
def test_chunk_kda_with_states_of_the_other_layout(B, T, H, D):
    """Results and gradients to 1e-4 of those with states [K, V]."""
    given = drawn(shapes(B, T, H, H, D, F16))
    options = dict(scale=1 if T < 1024 else 0.1, output_final_state=True)

    def op(q, k, **given):
        return chunk_kda(unit(q), unit(k), **given, **options)

    def turned(initial_state, **given):
        o, state = op(**given, initial_state=initial_state.mT, state_v_first=True)
        return o, state.mT

    assert_near(gradients(turned, given), gradients(op, given), 1e-4)


# FLA's two of B=1, T=8192, H=96, D=128 are traced alone, below: their gradients take gigabytes.
@pytest.mark.parametrize(("B", "T", "H", "D", "factor"), cases([(2, 96, 2, 64, 2)]))
def test_chunk_kda_with_a_raw_beta(B, T, H, D, factor):
    """Results and gradients to 1e-4 of those with its sigmoid in float32, or twice that."""
    given = drawn(shapes(B, T, H, H, D, F16))
    given["beta"] = np.log(given["beta"] / (1 - given["beta"]))
    options = NEGATIVE if factor == 2 else dict(use_beta_sigmoid_in_kernel=True)

    def op(q, k, **given):
        return chunk_kda(unit(q), unit(k), **given, output_final_state=True)

    def first(beta, **given):
        return op(**given, beta=factor * jax.nn.sigmoid(jnp.asarray(beta, jnp.float32)))

    assert_near(gradients(lambda **given: op(**given, **options), given), gradients(first, given), 1e-4)


FLASH = dict(use_beta_sigmoid_in_kernel=True) | TURNED | UNIT | RAW | SAFE
BOTH = ("A_log", "dt_bias")
# B, H; the ends of the sequences, or T; the gate's parameters; the factor of beta's sigmoid.
CUTLASS = [
    (1, 4, 1024, BOTH, 1),
    (2, 8, 2048, BOTH, 1),
    (1, 16, 4096, BOTH, 1),
    (1, 4, 1024, BOTH, 2),
    (1, 4, 1024, ("dt_bias",), 1),
    (1, 4, 1024, ("A_log",), 1),
    (1, 4, [0, 256, 500, 1000], BOTH, 1),
    (1, 8, [0, 100, 300, 1200, 2000], BOTH, 1),
    (1, 16, [0, 101, 303, 1205, 3007, 4096], BOTH, 1),
    (1, 4, [0, 256, 500, 1000], BOTH, 2),
    (1, 4, [0, 256, 500, 1000], ("dt_bias",), 1),
    (1, 4, [0, 256, 500, 1000], ("A_log",), 1),
]


@pytest.mark.parametrize(("B", "H", "ends", "parameters", "factor"), cases(CUTLASS))
def test_what_flash_kda_computes(B, H, ends, parameters, factor):
    """All that raw inputs can ask for, in bfloat16, to 0.006 of the token op in float64."""
    packing = dict(cu_seqlens=np.array(ends)) if isinstance(ends, list) else dict()
    N, T = (len(ends) - 1, ends[-1]) if packing else (B, ends)
    sizes = shapes(B, T, H, H, 128, BF16, N=N, parameters=BOTH)
    given = drawn(sizes, normal=("q", "k", "v") if packing else ())
    given["beta"] = np.random.default_rng(2).standard_normal(given["beta"].shape).astype(BF16)
    given = {name: x for name, x in given.items() if name in parameters or name not in BOTH}
    options = FLASH | dict(allow_neg_eigval=factor == 2, output_final_state=True) | packing
    made = jax.jit(lambda given: chunk_kda(**given, **options))(given)
    wide = {name: x.astype(np.float64) for name, x in given.items()}
    assert_near(both(made), both(fused_recurrent_kda(**wide, **options)), 0.006)


@pytest.mark.parametrize("packing", [dict(), dict(cu_seqlens=np.array([0, 512, 1024]))])
def test_intermediate_states_have_the_dtype_of_k(packing):
    """[B, NT, HV, D, D], dense and packed."""
    given = shapes(1 if packing else 2, 1024, 4, 4, 128, BF16, N=2)
    options = dict(output_final_state=True, return_intermediate_states=True) | packing
    o, state, h = jax.eval_shape(lambda given: chunk_kda(**given, **options), given)
    assert (o.shape, state.shape) == (given["v"].shape, given["initial_state"].shape)
    assert (h.shape, h.dtype) == ((given["q"].shape[0], 16, 4, 128, 128), BF16)


TRACED = [(dense_arguments(sizes, options), options) for sizes, _, options in (DENSE[1], DENSE[6], DENSE[12])]
TRACED += [
    (packed_arguments(H, D, ends, options), options | dict(cu_seqlens=np.array(ends)))
    for H, D, _, ends, options in PACKED[2:5]
]
TRACED += [(shapes(1, 8192, 96, 96, 128, BF16), NEGATIVE), (shapes(4, 2048, 8, 8, 64, F16), TURNED)]


@pytest.mark.parametrize(("given", "options"), TRACED)
def test_the_call_is_taken(given, options):
    """Every result and gradient has the shape and dtype of its array; the final state is in float32."""

    def call(given):
        results, pull = jax.vjp(lambda given: chunk_kda(**given, **options, output_final_state=True), given)
        return results, pull(results)[0]

    (o, state), made = jax.eval_shape(call, given)
    made |= dict(o=o, final_state=state)
    expected = given | dict(o=given["v"], final_state=given["initial_state"])
    assert {name: (x.shape, x.dtype) for name, x in made.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
