"""What a training loop and a server do around the ops: padding, states in a pool, layers, donated buffers.

float64 and 1e-12, unless the bits are to be the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import draw

from tops.cpu.kda import chunk_kda, fused_recurrent_kda, naive_recurrent_kda

pytestmark = [pytest.mark.unoptimized, pytest.mark.slow]
H, K, V = 2, 8, 6
LENGTHS = np.array([90, 17, 64])
T, ENDS = max(LENGTHS), np.concatenate([[0], np.cumsum(LENGTHS)])
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-12)


def batch(T, B=3, dtype=np.float64):
    return draw(B=B, T=T, H=H, K=K, V=V, dtype=dtype)


def by_mask(gate, mask, q, k, v, g, beta):
    """A token that is not in the mask writes nothing; `gate` is what it does to the state."""
    k, beta = jnp.where(mask[..., None, None], k, 0), jnp.where(mask[..., None], beta, 0)
    g = jnp.where(mask[..., None, None], g, gate)
    return chunk_kda(q, k, v, g, beta, output_final_state=True)


def by_packing(op, mask, *inputs):
    """The tokens of all rows in one, and back."""
    o, state = op(*(x[mask][None] for x in inputs), cu_seqlens=ENDS, output_final_state=True)
    return jnp.zeros(inputs[2].shape, o.dtype).at[mask].set(o[0]), state


@pytest.mark.parametrize(
    ("side", "way"),
    [
        ("left", partial(by_mask, -np.inf)),
        ("left", partial(by_mask, 0.0)),
        ("right", partial(by_mask, 0.0)),
        ("left", partial(by_packing, chunk_kda)),
    ],
    ids=["left, forgotten", "left, kept", "right, kept", "packed"],
)
def test_padding_of_a_batch(side, way):
    """Each row is its sequence alone, in o, final state and gradients; padding gets no gradient. Before a
    sequence that starts from zero, g = -inf forgets the same nothing that g = 0 keeps."""
    token = np.arange(T)
    mask = np.stack([token < n if side == "right" else token >= T - n for n in LENGTHS])

    def results(way):
        def loss(inputs):
            o, state = way(mask, *inputs)
            o = jnp.where(mask[..., None, None], o, 0)
            return (o**2).sum() + (state**2).sum(), (o, state)

        return jax.jit(jax.grad(loss, has_aux=True))(batch(T))

    made, expected = results(way), results(partial(by_packing, naive_recurrent_kda))
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        close(x, y)
    for x in made[0]:
        assert not np.asarray(x)[~mask].any()


@partial(jax.jit, donate_argnums=0)
def prefill(pool, slots, cu_seqlens, inputs):
    o, states = chunk_kda(*inputs, initial_state=pool[slots], output_final_state=True, cu_seqlens=cu_seqlens)
    return pool.at[slots].set(states), o


@partial(jax.jit, donate_argnums=0)
def decode(pool, slots, inputs):
    o, states = fused_recurrent_kda(*inputs, initial_state=pool[slots], output_final_state=True)
    return pool.at[slots].set(states), o


def test_prefill_in_pieces_then_decode_from_one_pool():
    """Sequences of uneven pieces, some of which are empty, one program for all: what one call makes. Slots of
    others keep their bits."""
    N, steps, slots = 3, 3, np.array([4, 0, 2])
    inputs = batch(T + steps)
    pool = jnp.full((6, H, K, V), 7.0).at[slots].set(0)
    done, outputs = np.zeros(N, int), [[] for _ in range(N)]
    for until in np.array([[40, 0, 32], [40, 17, 33], LENGTHS]):
        ends = np.concatenate([[0], np.cumsum(until - done)])
        pieces = (np.concatenate([x[n, done[n] : until[n]] for n in range(N)]) for x in inputs)
        pieces = [np.pad(x, [(0, ENDS[-1] - len(x))] + [(0, 0)] * (x.ndim - 1))[None] for x in pieces]
        pool, o = prefill(pool, slots, ends, pieces)
        for n in range(N):
            outputs[n].append(o[0, ends[n] : ends[n + 1]])
        done = until
    for step in range(steps):
        token = [np.stack([x[n, LENGTHS[n] + step] for n in range(N)])[:, None] for x in inputs]
        pool, o = decode(pool, slots, token)
        for n in range(N):
            outputs[n].append(o[n])
    for n in range(N):
        alone = [x[n : n + 1, : LENGTHS[n] + steps] for x in inputs]
        o, state = naive_recurrent_kda(*alone, output_final_state=True)
        close(jnp.concatenate(outputs[n]), o[0])
        close(pool[slots[n]], state[0])
    np.testing.assert_array_equal(np.delete(pool, slots, axis=0), 7)


def test_decoding_takes_the_donated_states():
    """The new states lie where the old ones lay."""
    states = jax.ShapeDtypeStruct((3, H, K, V), np.float32)

    def step(states, *token):
        return fused_recurrent_kda(*token, initial_state=states, output_final_state=True)

    token = batch(1, dtype=np.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(states, *token).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 3 * H * K * V * 4


WIDTH = 12


def parameters(rng, *shape):
    return 0.3 * rng.standard_normal(shape)


def hybrid_layer(op, x, p, cu_seqlens):
    """KDA and softmax attention within the sequences, both residual."""
    q, k, v, g, b = (jnp.einsum("btw,whd->bthd", x, p[name]) for name in "qkvgb")
    options = dict(use_qk_l2norm_in_kernel=True) if op is chunk_kda else {}
    if op is not chunk_kda:
        q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    o, _ = op(q, k, v, jax.nn.log_sigmoid(g), jax.nn.sigmoid(b[..., 0]), cu_seqlens=cu_seqlens, **options)
    x = x + jnp.einsum("bthv,hvw->btw", o, p["o"])
    token = jnp.arange(x.shape[1])
    sequence = jnp.searchsorted(cu_seqlens[1:], token, side="right")
    seen = (token[:, None] >= token) & (sequence[:, None] == sequence)
    scores = jnp.einsum("biw,wx,bjx->bij", x, p["a"], x)
    return x + jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1) @ x


def test_a_stack_of_layers_under_checkpoint_and_scan():
    """Four layers in one scan, each recomputed in the backward: the gradient of the layers written out, with
    the recurrence in place of the chunks."""
    rng = np.random.default_rng(0)
    layers = 4
    shapes = dict.fromkeys("qkg", (WIDTH, H, K)) | dict(v=(WIDTH, H, V), b=(WIDTH, H, 1))
    shapes |= dict(o=(H, V, WIDTH), a=(WIDTH, WIDTH))
    stack = {name: parameters(rng, layers, *shape) for name, shape in shapes.items()}
    x, ends = rng.standard_normal((1, 80, WIDTH)), jnp.array([0, 33, 33, 80])

    def scanned(stack, x):
        layer = partial(hybrid_layer, chunk_kda, cu_seqlens=ends)
        step = jax.checkpoint(lambda x, p: (layer(x, p), None))
        return (jax.lax.scan(step, x, stack)[0] ** 2).sum()

    def written_out(stack, x):
        for i in range(layers):
            x = hybrid_layer(naive_recurrent_kda, x, {name: p[i] for name, p in stack.items()}, ends)
        return (x**2).sum()

    made, expected = (jax.jit(jax.grad(loss, argnums=(0, 1)))(stack, x) for loss in (scanned, written_out))
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-11 * np.abs(y).max())


def test_a_step_that_donates_its_parameters():
    """Twice from the same start, with and without donation: the same bits."""
    inputs = batch(64, B=1, dtype=np.float32)

    def step(inputs):
        gradients = jax.grad(lambda inputs: (chunk_kda(*inputs)[0] ** 2).sum())(inputs)
        return jax.tree.map(lambda x, d: x - 0.01 * d, inputs, gradients)

    results = []
    for donated in ((), (0,)):
        train, state = jax.jit(step, donate_argnums=donated), jax.tree.map(jnp.array, inputs)
        for _ in range(2):
            state = train(state)
        results.append(state)
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)
