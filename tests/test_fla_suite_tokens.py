"""The calls of the token ops and gates in FLA's own suite: the same shapes, dtypes, options and tolerances.

`make test-long` computes every case, CI the small ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fla_suite import (
    BF16,
    BOUNDED,
    F16,
    F32,
    NEGATIVE,
    RAW,
    UNIT,
    activated,
    assert_near,
    both,
    cases,
    drawn,
    shapes,
    unit,
)

from tops.cpu.kda import (
    fused_kda_gate,
    fused_recurrent_kda,
    fused_recurrent_kda_fwd,
    naive_chunk_kda,
    naive_recurrent_kda,
)

pytestmark = [pytest.mark.unoptimized, pytest.mark.slow]

# B, T, H, HV, D; scale; what log decays are divided by.
NAIVE = [
    (1, 64, 1, 1, 64, 1, 1),
    (2, 512, 3, 3, 60, 1, 1),
    (4, 1024, 4, 4, 128, 0.1, 1),
    (4, 1024, 4, 4, 128, 1, 10),
    (1, 64, 1, 2, 64, 1, 1),
    (2, 512, 2, 4, 60, 1, 1),
]
FUSED = [
    (1, 64, 1, 1, 64, 1, 1),
    (2, 512, 3, 3, 60, 1, 1),
    (3, 1000, 4, 4, 100, 0.1, 1, UNIT),
    (4, 1024, 4, 4, 128, 0.1, 1),
    (2, 512, 2, 4, 60, 1, 1),
    (2, 1024, 2, 8, 128, 0.1, 1, UNIT),
]
FORWARD = [(naive_chunk_kda, *row) for row in NAIVE] + [(fused_recurrent_kda, *row) for row in FUSED]


@pytest.mark.parametrize(
    ("op", "B", "T", "H", "HV", "D", "scale", "by", "options"),
    cases([(*row, dict()) if len(row) == 8 else row for row in FORWARD], small=(0, 6)),
)
def test_the_other_ops(op, B, T, H, HV, D, scale, by, options):
    """Against the recurrence, in float32: to 0.005."""
    given = drawn(shapes(B, T, H, HV, D, F32), by=by)
    normalised = given | {name: unit(given[name]) for name in ("q", "k")}
    made = op(**(given if options else normalised), scale=scale, output_final_state=True, **options)
    expected = naive_recurrent_kda(**normalised, scale=scale, output_final_state=True)
    assert_near(both(made), both(expected), 0.005)


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "factor"),
    cases([(2, 256, 4, 64, 1), (2, 256, 4, 64, 2), (1, 512, 3, 60, 2)], small=(1,)),
)
def test_decoding_with_a_raw_beta(B, T, H, D, factor):
    """To 0.005 of its sigmoid, or twice that."""
    given = drawn(shapes(B, T, H, H, D, F32))
    given |= {name: unit(given[name]) for name in ("q", "k")}
    raw = given | dict(beta=np.log(given["beta"] / (1 - given["beta"])))
    options = NEGATIVE if factor == 2 else dict(use_beta_sigmoid_in_kernel=True)
    made = fused_recurrent_kda(**raw, **options, output_final_state=True)
    first = fused_recurrent_kda(**given | dict(beta=factor * given["beta"]), output_final_state=True)
    assert_near(both(made), both(first), 0.005)


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "scale"),
    cases(
        [(1, 64, 1, 64, 1), (2, 512, 3, 60, 1), (3, 1000, 4, 100, 0.1), (4, 1024, 4, 128, 0.1)], small=(0,)
    ),
)
def test_decoding_with_states_of_the_other_layout(B, T, H, D, scale):
    """To 1e-4 of states [K, V]. The flag's deprecated name says the same, with a warning."""
    given = drawn(shapes(B, T, H, H, D, F32))
    given |= {name: unit(given[name]) for name in ("q", "k")}
    turned = given | dict(initial_state=given["initial_state"].mT)
    options = dict(scale=scale, output_final_state=True)
    o, state = fused_recurrent_kda(**turned, **options, state_v_first=True)
    assert_near(both((o, state.mT)), both(fused_recurrent_kda(**given, **options)), 1e-4)
    with pytest.warns(DeprecationWarning):
        again = fused_recurrent_kda(**turned, **options, transpose_state_layout=True)
    np.testing.assert_array_equal(again[1], state)
    with pytest.raises(ValueError, match="transpose_state_layout"):
        fused_recurrent_kda(**turned, state_v_first=True, transpose_state_layout=True)


# B, T, H, HV, D, dtype; scale; the gate's parameters; its bound.
GATED = [
    ((1, 64, 1, 1, 64, F32), 1, ("A_log",), dict()),
    ((2, 256, 2, 2, 64, F32), 1, ("A_log", "dt_bias"), dict()),
    ((2, 512, 2, 4, 64, F16), 0.1, ("A_log", "dt_bias"), BOUNDED),
    ((3, 1000, 2, 8, 128, F16), 1, ("A_log",), dict()),
    ((4, 1024, 4, 4, 128, F16), 0.1, ("A_log", "dt_bias"), BOUNDED),
    ((1, 64, 1, 1, 64, F32), 1, (), BOUNDED),
    ((2, 256, 2, 4, 64, F32), 1, ("dt_bias",), BOUNDED),
]


@pytest.mark.parametrize(("sizes", "scale", "parameters", "bound"), cases(GATED, small=(0, 5)))
def test_decoding_with_a_raw_gate(sizes, scale, parameters, bound):
    """To 0.002 of the gate activated first."""
    given = drawn(shapes(*sizes, parameters=("A_log", "dt_bias")))
    given["g"] = given["g"].astype(F32)
    gate = {name: given.pop(name) for name in ("A_log", "dt_bias")}
    gate = {name: gate[name] for name in parameters} | bound
    options = dict(scale=scale, output_final_state=True) | UNIT
    made = fused_recurrent_kda(**given, **gate, **options, **RAW)
    first = fused_recurrent_kda(**given | dict(g=activated(given["g"], **gate)), **options)
    assert_near(both(made), both(first), 0.002)


# B, H, D, dtype; scale; what log decays are divided by; the options. One token a sequence, packed.
DECODE = [
    (16, 16, 128, BF16, 0.1, 1, UNIT),
    (32, 8, 64, F16, 1, 1, dict()),
    (7, 32, 128, BF16, 0.5, 0.5, UNIT),
    (16, 16, 128, BF16, 0.1, 1, UNIT | RAW),
    (32, 8, 64, F16, 1, 1, RAW),
    (7, 32, 128, BF16, 0.5, 0.5, UNIT | RAW | BOUNDED),
]


@pytest.mark.parametrize(("B", "H", "D", "dtype", "scale", "by", "options"), cases(DECODE, small=(1, 4)))
def test_decoding_from_a_pool(B, H, D, dtype, scale, by, options):
    """To 0.005 of the recurrence from the states of the pool. The other slots keep theirs, to the bit."""
    parameters = ("A_log", "dt_bias") if "use_gate_in_kernel" in options else None
    given = drawn(shapes(1, B, H, H, D, dtype, N=3 * B, parameters=parameters), by=by)
    slots = np.random.default_rng(3).permutation(3 * B)[:B].astype(np.int32)
    others = np.setdiff1d(np.arange(3 * B), slots)
    given["initial_state"][others] = 1e30
    normalised = given | {name: unit(given[name]) for name in ("q", "k")}
    o, pool = fused_recurrent_kda_fwd(
        **(given if "use_qk_l2norm_in_kernel" in options else normalised), scale=scale, **options,
        inplace_final_state=True, cu_seqlens=np.arange(B + 1, dtype=np.int32), ssm_state_indices=slots,
    )  # fmt: skip
    gate = {name: given[name] for name in parameters or ()} | {
        name: options[name] for name in BOUNDED.keys() & options
    }
    g = activated(given["g"], **gate) if parameters else given["g"]
    tokens = [
        np.asarray(x).swapaxes(0, 1) for x in (normalised["q"], normalised["k"], given["v"], g, given["beta"])
    ]
    expected = naive_recurrent_kda(*tokens, scale, given["initial_state"][slots], output_final_state=True)
    assert_near(both((o[0, :, None], pool[slots])), both(expected), 0.005)
    np.testing.assert_array_equal(pool[others], given["initial_state"][others])


GATES = [
    ((1, 2, 2, 12), ("A_log",), BOUNDED),
    ((1, 32, 2, 16), ("A_log",), BOUNDED),
    ((2, 64, 4, 32), ("A_log",), BOUNDED),
    ((4, 128, 8, 64), ("A_log",), BOUNDED),
    ((4, 128, 8, 128), ("A_log",), dict()),
    ((1, 2, 2, 12), ("A_log", "dt_bias"), dict()),
    ((1, 32, 2, 16), ("A_log", "dt_bias"), dict()),
    ((2, 64, 4, 32), ("A_log", "dt_bias"), dict()),
    ((4, 128, 8, 64), ("A_log", "dt_bias"), dict()),
    ((4, 128, 8, 128), ("A_log", "dt_bias"), dict()),
    ((1, 2, 2, 12), (), BOUNDED),
    ((2, 64, 4, 32), (), BOUNDED),
    ((4, 128, 8, 64), ("dt_bias",), BOUNDED),
    ((4, 128, 8, 128), ("dt_bias",), BOUNDED),
]


@pytest.mark.parametrize(("sizes", "parameters", "bound"), cases(GATES, small=(0, 7)))
def test_gates(sizes, parameters, bound):
    """The fused gate, the naive one, and their gradients: to 1e-4."""
    rng = np.random.default_rng(42)
    *_, H, D = sizes
    given = dict(g=10 * rng.standard_normal(sizes, F32))
    made = dict(A_log=np.log(rng.uniform(1, 16, (1, 1, H, 1))), dt_bias=rng.standard_normal(H * D))
    given |= {name: made[name].astype(F32) for name in parameters}
    d = rng.standard_normal(sizes, F32)

    def run(op):
        o, pull = jax.vjp(lambda given: op(**given, **bound), given)
        return dict(o=o) | pull(jnp.asarray(d))[0]

    assert_near(run(fused_kda_gate), run(activated), 1e-4)
