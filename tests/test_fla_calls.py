"""FLA's call, word for word: its arguments by position, the forms it takes, the dtypes it returns."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fla_calls import BY_POSITION
from inputs import draw

import tops.cpu.kda as kda

pytestmark = pytest.mark.unoptimized
T, H, HV, K, V = 40, 2, 4, 8, 6
ENDS = np.array([0, 17, 17, 36])  # an empty sequence, padding
Q, K_, V_, G, BETA = draw(T=T, H=H, HV=HV, K=K, V=V, dtype=np.float32)
GIVEN = dict(q=Q, k=K_, v=V_, g=G, beta=BETA)
A_LOG, DT_BIAS = (np.linspace(-1, 1, n, dtype=np.float32) for n in (HV, HV * K))
A = np.tile(np.eye(64, dtype=np.float32)[:T, None], (1, 1, HV, 1))
CHUNK_STATES = np.ones((1, 2, HV, K, V), np.float32)
PACKED = dict(cu_seqlens=ENDS)
FORWARD = dict.fromkeys(
    (kda.chunk_kda, kda.chunk_kda_fwd, kda.fused_recurrent_kda), GIVEN | dict(output_final_state=True)
)
ORACLES = dict.fromkeys((kda.naive_recurrent_kda, kda.naive_chunk_kda), GIVEN)
STATE_PASS = {kda.chunk_gated_delta_rule_fwd_h: dict(k=K_, w=G, u=V_, gk=G) | PACKED}
OUTPUT = {kda.chunk_gla_fwd_o_gk: dict(q=Q, v=V_, g=G, A=A, h=CHUNK_STATES, scale=None) | PACKED}
STAGES = OUTPUT | {
    kda.chunk_kda_fwd_intra: dict(q=Q, k=K_, v=V_, gk=G, beta=BETA),
    kda.recompute_w_u_fwd: dict(k=K_, v=V_, beta=BETA, A=A, gk=G),
    kda.chunk_local_cumsum: dict(g=G, chunk_size=8),
    kda.kda_gate_chunk_cumsum: dict(g=G, A_log=A_LOG, chunk_size=8),
}
HELPERS = {
    kda.prepare_lens: {},
    kda.prepare_chunk_offsets: dict(chunk_size=8),
    kda.prepare_chunk_indices: dict(chunk_size=8),
}
LOWER = np.tril(np.ones((T, 64), np.float32))[None, :, None] * np.ones((HV, 1), np.float32)
BACKWARD = {
    kda.chunk_kda_bwd: dict(q=Q, k=K_, v=V_, beta=BETA, Aqk=LOWER, Akk=A, scale=None, initial_state=None)
    | dict(do=V_, dht=None, g=G),
    kda.chunk_kda_bwd_dAv: dict(q=Q, k=K_, v=V_, do=V_, A=LOWER),
    kda.chunk_gated_delta_rule_bwd_dhu: dict(q=G, k=G, w=G, do=V_, dv=V_, gk=G),
    kda.chunk_kda_bwd_wy_dqkg_fused: GIVEN
    | dict(v_new=V_, A=A, h=CHUNK_STATES, do=V_, dh=CHUNK_STATES, dv=V_),
    kda.chunk_kda_bwd_intra: dict(q=Q, k=K_, g=G, beta=BETA, dAqk=LOWER, dAkk=LOWER)
    | dict(dq=G, dk=G, db=BETA, dg=G),
}
GATES = {op: dict(g=G) for op in (kda.kda_gate_fwd, kda.naive_kda_gate, kda.naive_kda_lowerbound_gate)}
COPIED = {kda.chunk_kda, kda.chunk_kda_fwd, *STATE_PASS, kda.prepare_chunk_indices}
SCALED = FORWARD.keys() | ORACLES | STAGES.keys() - {kda.recompute_w_u_fwd}
STATE = np.ones((HV, K, V), np.float32)
IN_KERNEL = dict(use_gate_in_kernel=True)
PARAMETERS = dict(A_log=A_LOG, dt_bias=DT_BIAS)
IN_CHECKPOINTS = dict(A_log=A_LOG.reshape(1, 1, HV, 1), dt_bias=DT_BIAS.reshape(HV, K))
# What a form is of, the form, the same call in plain words, and who takes it.
FORMS = [
    ("disable_recompute", dict(disable_recompute=True), {}, {kda.chunk_kda}),
    ("max_num_seqs", dict(max_num_seqs=9), {}, {kda.chunk_kda}),
    ("graph", PACKED | dict(use_graph=True, max_num_seqs=3), PACKED, {kda.chunk_kda}),
    ("use_graph", PACKED | dict(use_graph=True), PACKED, {kda.chunk_kda_fwd, *STAGES}),
    (
        "padded",
        PACKED | dict(use_graph=True, chunk_indices=np.array([[0, 0], [2, 0], [-1, 0]])),
        PACKED,
        {kda.chunk_kda_fwd, kda.chunk_kda_fwd_intra, kda.recompute_w_u_fwd},
    ),
    ("copy", PACKED | dict(cu_seqlens_cpu=ENDS.astype(np.int32)), PACKED, COPIED),
    (
        "offsets",
        PACKED | dict(chunk_offsets=np.array([0, 1, 1, 2])),
        PACKED,
        {kda.chunk_kda_fwd, *STATE_PASS},
    ),
    ("list", dict(cu_seqlens=ENDS.tolist()), PACKED, {*FORWARD, *ORACLES, *STAGES, *STATE_PASS, *HELPERS}),
    ("backward", PACKED | dict(cu_seqlens=ENDS.tolist(), use_graph=True), PACKED, {*BACKWARD}),
    ("scale", dict(scale=jnp.float32(0.75)), dict(scale=0.75), SCALED),
    ("parameters that nobody reads", PARAMETERS, {}, {*FORWARD}),
    ("parameters", IN_KERNEL | IN_CHECKPOINTS, IN_KERNEL | PARAMETERS, {*FORWARD}),
    ("state of one sequence", dict(initial_state=STATE), dict(initial_state=STATE[None]), {*ORACLES}),
    ("parameters of a gate", IN_CHECKPOINTS, PARAMETERS, {*GATES, kda.kda_gate_chunk_cumsum}),
]
ARRAYS = FORWARD | ORACLES | STAGES | STATE_PASS | HELPERS | GATES | BACKWARD


def assert_same_bits(made, expected):
    made, expected = jax.tree.leaves(made), jax.tree.leaves(expected)
    assert len(made) == len(expected) > 0
    for x, y in zip(made, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("op", "form", "plain"),
    [
        pytest.param(op, form, plain, id=f"{name}-{op.__name__}", marks=[pytest.mark.slow] if i else [])
        for name, form, plain, ops in FORMS
        for i, op in enumerate(sorted(ops, key=lambda op: op.__name__))
    ],
)
def test_every_form_is_the_plain_one_to_the_bit(op, form, plain):
    assert_same_bits(op(**ARRAYS[op] | form), op(**ARRAYS[op] | plain))


@pytest.mark.parametrize("name", BY_POSITION)
def test_arguments_by_position(name):
    """Those of FLA, and nothing else. `recompute_w_u_fwd` stops before gk and q, two arrays of one shape that
    FLA's releases have in either order."""
    parameters = inspect.signature(getattr(kda, name)).parameters
    by_position = [x for x, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = BY_POSITION[name].split()
    assert set(expected) <= parameters.keys()
    assert by_position == (expected[:4] if name == "recompute_w_u_fwd" else expected)


@pytest.mark.parametrize(
    ("narrow", "op"), [("qk", kda.chunk_kda), pytest.param("v", kda.chunk_kda_fwd, marks=pytest.mark.slow)]
)
def test_v_of_another_dtype(narrow, op):
    """Widened exactly: the bits are those of wide inputs. o has q's dtype from `chunk_kda` and v's from the
    others, as FLA's `type_as(q)` and `empty_like(v)` say."""
    mixed = GIVEN | {name: jnp.asarray(GIVEN[name], jnp.bfloat16) for name in narrow}
    wide = {name: x.astype(jnp.float32) for name, x in mixed.items()}
    assert_same_bits(op(**mixed, output_dtype=np.float32)[0], op(**wide)[0])
    dtypes = {op: jax.eval_shape(op, **mixed)[0].dtype for op in (*FORWARD, *ORACLES)}
    assert dtypes.pop(kda.chunk_kda) == mixed["q"].dtype
    assert set(dtypes.values()) == {mixed["v"].dtype}


def test_states_of_chunk_kda_are_as_k():
    """FLA's h has k's dtype, and that of `storage_dtype` where one is asked for."""
    given = {name: jnp.asarray(x, jnp.bfloat16) for name, x in GIVEN.items()}
    h = partial(kda.chunk_kda, **given, return_intermediate_states=True)
    exact = kda.chunk_kda_fwd(**given, return_intermediate_states=True).h
    assert_same_bits(h()[2], exact.astype(jnp.bfloat16))
    assert h(storage_dtype=np.float16)[2].dtype == np.float16


@pytest.mark.parametrize(
    "op",
    [
        *OUTPUT,
        kda.fused_recurrent_kda,
        *(pytest.param(op, marks=pytest.mark.slow) for op in (kda.chunk_kda, kda.chunk_kda_fwd)),
    ],
)
def test_output_dtype(op):
    """float32 is what float16 rounds, and finite where it overflows."""
    given = ARRAYS[op] | dict(scale=1e5)
    given |= {
        name: x.astype(np.float16) for name, x in given.items() if getattr(x, "dtype", None) == "float32"
    }
    wide, narrow = (jax.tree.leaves(op(**given, output_dtype=x))[0] for x in (np.float32, None))
    assert_same_bits(wide.astype(np.float16), narrow)
    assert np.isfinite(wide).all()
    assert np.isinf(narrow).any()


def test_context_parallel_takes_the_same_forms():
    given = {name: x.astype(np.float16) for name, x in GIVEN.items()} | IN_CHECKPOINTS
    options = dict(axis_name="t", mesh=jax.sharding.Mesh(jax.devices("cpu")[:1], ("t",)))
    options |= dict(cu_seqlens=ENDS.tolist(), scale=np.array(0.75))
    for dtype in (None, np.dtype(np.float32)):
        op = partial(kda.context_parallel_kda, **options, output_dtype=dtype)
        assert jax.eval_shape(op, **given)[0].dtype == (dtype or np.float16)


def test_gradients_have_the_form_of_what_they_are_of():
    given = GIVEN | IN_KERNEL | IN_CHECKPOINTS
    arrays = {name: given[name] for name in ("v", "A_log", "dt_bias")} | dict(v=jnp.asarray(V_, jnp.bfloat16))
    others = {name: x for name, x in given.items() if name not in arrays}

    def loss(arrays):
        return kda.chunk_kda(**arrays, **others, output_dtype=np.float32)[0].sum()

    made = jax.eval_shape(jax.grad(loss), arrays)
    for name, x in arrays.items():
        assert (made[name].shape, made[name].dtype) == (x.shape, x.dtype)
