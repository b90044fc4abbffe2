"""What the cases of FLA's own suite, `tests/ops/test_kda.py`, are made of.

FLA's tolerance is the error's norm over the norm.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tops.cpu.kda import naive_kda_gate, naive_kda_lowerbound_gate, naive_recurrent_kda

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)
RAW = dict(use_gate_in_kernel=True)
BOUNDED = dict(lower_bound=-5.0)
SAFE = dict(safe_gate=True) | BOUNDED
UNIT = dict(use_qk_l2norm_in_kernel=True)
NEGATIVE = dict(use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
KEEP = dict(disable_recompute=True)
C32 = dict(chunk_size=32)


def cases(table, small=()):
    """Each row, with the mark `long` but for the small ones."""
    return [pytest.param(*row, marks=() if i in small else pytest.mark.long) for i, row in enumerate(table)]


def shapes(B, T, H, HV, D, dtype, N=None, parameters=None):
    """The arguments by their shapes and dtypes. `parameters` are those of a raw gate, None of a log decay."""
    narrow = dict(q=(B, T, H, D), k=(B, T, H, D), v=(B, T, HV, D), g=(B, T, HV, D), beta=(B, T, HV))
    wide = dict(initial_state=(N or B, HV, D, D))
    if parameters is None:
        wide["g"] = narrow.pop("g")
    wide |= {name: dict(A_log=(HV,), dt_bias=(HV * D,))[name] for name in parameters or ()}
    of_both = ((narrow, dtype), (wide, F32))
    return {name: jax.ShapeDtypeStruct(size, of) for sizes, of in of_both for name, size in sizes.items()}


def drawn(shapes, by=1, zeros=0.0, resets=0.0, normal=()):
    """Values for them: q, k and v in [0, 1), or normal; beta behind a sigmoid; log decays divided by `by`. Of
    the gates a part of `zeros` is 0, one of `resets` -1000."""
    rng = np.random.default_rng(42)
    made = {}
    for name, x in shapes.items():
        uniform = name in ("q", "k", "v") and name not in normal
        y = rng.random(x.shape, F32) if uniform else rng.standard_normal(x.shape, F32)
        if name == "beta":
            y = 1 / (1 + np.exp(-y))
        if name == "g":
            if "A_log" not in shapes and "dt_bias" not in shapes:
                y = -np.logaddexp(0, -y) / by
            y[rng.random(x.shape, F32) < zeros] = 0
            y[rng.random(x.shape, F32) < resets] = -1000
        made[name] = y.astype(x.dtype)
    return made


def unit(x):
    """To the norm 1, in its dtype."""
    wide = jnp.asarray(x, jnp.float32)
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(x.dtype)


def activated(g, A_log=None, dt_bias=None, lower_bound=None):
    """The log decay of a raw gate."""
    if lower_bound is None:
        return naive_kda_gate(g, A_log, dt_bias)
    return naive_kda_lowerbound_gate(g, A_log, dt_bias, lower_bound)


def recurrence(q, k, v, g, beta, initial_state, scale=None):
    """The token recurrence. Its gradient keeps the states of a piece of at most 64 tokens, not of all."""
    B, T = q.shape[:2]
    n = max(n for n in range(1, 65) if T % n == 0)
    pieces = [jnp.moveaxis(x.reshape(B, T // n, n, *x.shape[2:]), 1, 0) for x in (q, k, v, g, beta)]

    @jax.checkpoint
    def piece(state, x):
        o, state = naive_recurrent_kda(*x, scale=scale, initial_state=state, output_final_state=True)
        return state, o

    state, o = lax.scan(piece, jnp.asarray(initial_state), pieces)
    return jnp.moveaxis(o, 0, 1).reshape(v.shape), state


def sequences(ends, q, k, v, g, beta, initial_state):
    """The recurrence of one packed sequence after the other."""
    made = []
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        tokens = (x[:, start:end] for x in (q, k, v, g, beta))
        made.append(recurrence(*tokens, initial_state[n : n + 1]))
    o, states = zip(*made, strict=True)
    return jnp.concatenate(o, axis=1), jnp.concatenate(states)


def gradients(op, given):
    """The results of an op by name, and the gradients of what it is given."""
    rng = np.random.default_rng(1)

    @jax.jit
    def run(given, *cotangents):
        results, pull = jax.vjp(lambda given: op(**given), given)
        return results, pull(cotangents)[0]

    like = (given[name] for name in ("v", "initial_state"))
    (o, final_state), made = run(given, *(rng.standard_normal(x.shape, F32).astype(x.dtype) for x in like))
    return dict(o=o, final_state=final_state) | {f"d {name}": x for name, x in made.items()}


def error(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def assert_near(made, expected, bound, **bounds):
    """Each result to its bound, all others to `bound`."""
    assert made.keys() == expected.keys()
    for name, x in made.items():
        assert x.shape == expected[name].shape, name
        assert error(x, expected[name]) <= bounds.get(name.removeprefix("d "), bound), name


def both(results):
    return dict(zip(("o", "final_state"), results, strict=True))
