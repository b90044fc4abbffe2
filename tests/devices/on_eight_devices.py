"""What `test_devices.py` runs in a process that has 8 devices: batch, heads and time over a mesh.

One device's `chunk_kda`, which the rest of the suite judges, and the recurrence of the suite judge here. The
bounds are rounding's: each device cuts chunks from its own first token, so no bit need be the same.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import collectives, product_flops
from inputs import REGIMES, draw
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from oracle import recurrence, relative_error

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, context_parallel_kda

P = 8
MESH = Mesh(np.array(jax.devices()), ("time",))
GRID = Mesh(np.array(jax.devices()).reshape(2, 4), ("other", "time"))
over_time = partial(context_parallel_kda, mesh=MESH, axis_name="time", chunk_size=16)
one_device = partial(chunk_kda, chunk_size=16)

T, H, HV, K, V = 160, 1, 2, 8, 4  # 20 tokens a device: a chunk and a part of one
# Sequence 2 spans devices 1 to 3, 3 ends where device 3 does, 4 and 5 lie inside device 4, 7 starts on its
# last token; 1 and 6 are empty. From token 150 on there is padding.
CU_SEQLENS = np.array([0, 25, 25, 71, 80, 90, 99, 99, 150], np.int32)
N = len(CU_SEQLENS) - 1
# Equal keys let no rounding die: two chunk sizes on one device are as far apart there (4e-6), and the bound
# of the accuracy table is 2e-5.
FLOAT32 = {regime: 2e-5 if regime == "equal_keys" else 1e-6 for regime in REGIMES}


def inputs(regime, dtype):
    states = np.random.default_rng(1).standard_normal((N, HV, K, V)).astype(np.float32)
    return *draw(regime, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype), states.astype(dtype)


def forward(op, *x, cu_seqlens=CU_SEQLENS):
    return op(*x[:5], initial_state=x[5], cu_seqlens=cu_seqlens, output_final_state=True)


@cache
def gradients(op):
    """(o, final state) and the gradients of all six arrays, for random cotangents."""

    def run(*x):
        results, pull = jax.vjp(partial(forward, op), *x)
        rng = np.random.default_rng(2)
        return results, pull(tuple(rng.standard_normal(y.shape).astype(y.dtype) for y in results))

    return jax.jit(run)


def far(x, y):
    return max(
        relative_error(a, np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_float64_and_its_gradients(regime):
    x = inputs(regime, np.float64)
    assert far(gradients(over_time)(*x), gradients(one_device)(*x)) <= 1e-12


@pytest.mark.parametrize("regime", REGIMES)
def test_float32_and_its_gradients(regime):
    """The forward against one device's in float32; that and the gradients against float64."""
    x = inputs(regime, np.float32)
    made = gradients(over_time)(*x)
    assert far(made[0], forward(one_device, *x)) <= FLOAT32[regime]
    assert far(made, gradients(one_device)(*inputs(regime, np.float64))) <= FLOAT32[regime]


@pytest.mark.parametrize("seed", range(20))
def test_any_packing(seed):
    """Ends drawn from few tokens, device boundaries among them: sequences are empty, or share a device."""
    rng = np.random.default_rng(seed)
    ends = rng.choice(np.concatenate([np.arange(0, T + 1, T // P), rng.integers(0, T + 1, 4)]), N)
    cu_seqlens = np.concatenate([[0], np.sort(ends)]).astype(np.int32)
    x = inputs("weak", np.float64)
    o, states = forward(over_time, *x, cu_seqlens=cu_seqlens)
    expected = recurrence(*x[:5], initial_state=x[5], cu_seqlens=cu_seqlens)
    np.testing.assert_allclose(o, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(states, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("poisoned", [2, 7])
def test_poison_stays_in_its_sequence(poisoned):
    x = inputs("weak", np.float64)
    clean = forward(over_time, *x)
    rows = slice(*CU_SEQLENS[poisoned : poisoned + 2])
    for y in x[:5]:
        y[:, rows] = np.nan
    for y in x[:5]:
        y[:, CU_SEQLENS[-1] :] = np.nan
    o, states = forward(over_time, *x)
    assert np.isnan(o[:, rows]).all()
    np.testing.assert_array_equal(np.delete(o, np.r_[rows], axis=1), np.delete(clean[0], np.r_[rows], axis=1))
    np.testing.assert_array_equal(np.delete(states, poisoned, 0), np.delete(clean[1], poisoned, 0))


RAW = dict(
    use_qk_l2norm_in_kernel=True,
    use_gate_in_kernel=True,
    use_beta_sigmoid_in_kernel=True,
    allow_neg_eigval=True,
    A_log=np.linspace(-1, 1, 4),
    dt_bias=np.linspace(-1, 0, 4 * K),
    scale=0.7,
    state_v_first=True,
)


@pytest.mark.parametrize(
    ("B", "axes", "options"),
    [
        (1, dict(head_axis_name="other"), RAW | dict(cu_seqlens=CU_SEQLENS)),
        (2, dict(batch_axis_name="other"), RAW | dict(lower_bound=-2.0, safe_gate=True, dt_bias=None)),
    ],
)
def test_options_on_a_grid(B, axes, options):
    x = draw(B=B, T=T, H=2, HV=4, K=K, V=V, dtype=np.float64)
    states = np.random.default_rng(1).standard_normal((N if B == 1 else B, 4, V, K))
    options = options | dict(initial_state=states, output_final_state=True)
    on_grid = partial(context_parallel_kda, mesh=GRID, axis_name="time", chunk_size=16, **axes)
    assert far(on_grid(*x, **options), one_device(*x, **options)) <= 1e-12


def test_storage_dtype():
    """With one device's chunks: its bits up to the first boundary, then less error (maps are not rounded)."""
    x = draw("weak", T=16 * P, H=2, K=32)
    rounded = [np.asarray(op(*x, storage_dtype=jnp.bfloat16)[0]) for op in (over_time, one_device)]
    np.testing.assert_array_equal(rounded[0][:, :16], rounded[1][:, :16])
    errors = [far(o, one_device(*x)[0]) for o in rounded]
    assert errors[1] / 4 <= errors[0] <= errors[1]


def shapes(B, T, H, HV, K, V, mesh, spec):
    sharding = NamedSharding(mesh, spec)
    last = [(H, K), (H, K), (HV, V), (HV, K), (HV,)]
    return [jax.ShapeDtypeStruct((B, T, *x), jnp.float32, sharding=sharding) for x in last]


def compiled(op, *x, **options):
    return jax.jit(partial(op, **options)).lower(*x).compile()


@pytest.mark.parametrize(
    ("B", "spec"), [(8, Spec("x")), (1, Spec(None, None, "x")), (2, Spec(None, None, "x"))]
)
@pytest.mark.parametrize("op", [chunk_kda, partial(chunk_kda_fwd, disable_recompute=True)])
def test_batch_and_heads_need_no_collective(op, B, spec):
    """And the outputs are sharded as the inputs are: heads on axis 2, but on axis 1 of a state."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    program = compiled(op, *shapes(B, 40, 8, 16, K, V, mesh, spec), chunk_size=16, output_final_state=True)
    assert collectives(program) == []
    outputs = program.output_shardings
    final_state = outputs[1]
    others = [x for x in jax.tree.leaves(outputs) if x is not final_state]
    state_spec = spec if B == 8 else Spec(None, "x")
    assert final_state.spec == state_spec
    assert all(x.spec == spec for x in others)


@pytest.mark.parametrize(
    ("B", "spec"), [(8, Spec("x")), (1, Spec(None, None, "x")), (2, Spec(None, None, "x"))]
)
@pytest.mark.parametrize("T", [40, 48])  # with a part of a chunk, and of whole chunks
def test_gradients_over_batch_and_heads_need_no_collective(T, B, spec):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = shapes(B, T, 8, 8, 24, 20, mesh, spec)

    def gradient(o, *x):
        return jax.vjp(lambda *x: chunk_kda(*x, chunk_size=16)[0], *x)[1](o)

    program = compiled(gradient, x[2], *x)
    assert collectives(program) == []
    assert all(y.spec == spec for y in program.output_shardings)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_axis", [None, "other"])
def test_the_exchange_is_one_all_gather(packed, head_axis):
    """HV K (K + V) values of each device; a final state is one all-reduce more."""
    x = shapes(1, T, 2, 4, K, V, GRID, Spec(None, "time", head_axis))
    options = dict(mesh=GRID, axis_name="time", head_axis_name=head_axis, chunk_size=16)
    options |= dict(cu_seqlens=CU_SEQLENS if packed else None)
    HV = 4 // (1 if head_axis is None else 2)
    maps = ("all-gather", 4 * HV * K * (K + V))
    states = ("all-reduce", (N if packed else 1) * HV * K * V)
    results = compiled(context_parallel_kda, *x, output_final_state=True, **options)
    assert collectives(results) == [maps, states]
    assert collectives(compiled(lambda *x: context_parallel_kda(*x, **options)[0], *x)) == [maps]


def test_at_most_twice_the_arithmetic():
    """One sequence over all devices is the dearest case; the last device needs no map. Kimi-Linear's head."""
    T, H, K = 2**17, 2, 128
    whole = product_flops(compiled(chunk_kda, *shapes(1, T, H, H, K, K, MESH, Spec())))
    program = compiled(
        partial(context_parallel_kda, mesh=MESH, axis_name="time"),
        *shapes(1, T, H, H, K, K, MESH, Spec(None, "time")),
    )
    most, least = product_flops(program), product_flops(program, min)
    assert least == whole / P
    assert (P - 1) * most + least <= 2 * whole
    assert most <= 2.15 * whole / P
