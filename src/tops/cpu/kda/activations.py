"""What is made of raw inputs before the stages, and the sums of g that FLA's contract returns."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RCP_LN2 = 1.4426950408889634  # 1 / ln 2: nats to log2
L2NORM_EPS = 1e-6


class Activations(NamedTuple):
    """Which of q, k, g and beta come raw; by default none."""

    qk_l2norm: bool = False
    gate: bool = False
    lower_bound: float | None = None
    beta_scale: float | None = None  # beta <- beta_scale * sigmoid(beta)


def l2norm(x):
    """x / sqrt(sum_d x_d^2 + 1e-6) over the last axis, as `fla.modules.l2norm`."""
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def log_decay(g, A_log, dt_bias, lower_bound):
    """The log decay, in nats, of raw gates g [..., HV, K]; A_log [HV] beside a bound and dt_bias [HV * K]
    may be None.

    lower_bound is None:  -exp(A_log) * softplus(g + dt_bias)
    else:                 lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
    """
    g = g if dt_bias is None else g + dt_bias.reshape(g.shape[-2:])
    if lower_bound is None:
        return -jnp.exp(A_log)[:, None] * jax.nn.softplus(g)
    return float(lower_bound) * jax.nn.sigmoid(g if A_log is None else jnp.exp(A_log)[:, None] * g)


@log_decay.defjvp
def _log_decay_jvp(lower_bound, primals, tangents):
    """An infinite gate has the tangents of a huge one: its own are 0 times infinity."""
    g, *parameters = primals
    finite = jnp.clip(g, -1e30, 1e30), *parameters
    _, tangent = jax.jvp(lambda *x: log_decay.fun(*x, lower_bound), finite, tangents)
    return log_decay(*primals, lower_bound), tangent


def activate(q, k, g, beta, A_log, dt_bias, activations, store):
    """(q, k, g, beta) as the recurrence takes them; in token layout, in the accumulator dtype.

    `store` rounds what FLA stores: of these, the normalised q and k.
    """
    A_log, dt_bias = (None if x is None else x.astype(g.dtype) for x in (A_log, dt_bias))
    if activations.qk_l2norm:
        q, k = store(l2norm(q)), store(l2norm(k))
    if activations.gate:
        g = log_decay(g, A_log, dt_bias, activations.lower_bound)
    if activations.beta_scale is not None:
        beta = activations.beta_scale * jax.nn.sigmoid(beta)
    return q, k, g, beta


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def cumsum(g, axis, reverse=False):
    """Cumulative sum, one token after the other.

    A scan by doubling would round neighbours apart. What reads the sums takes differences of them, and
    summed in order, a step between neighbours is rounded just once.
    """
    n = g.shape[axis]

    def add(i, sums):
        i, before = (n - 1 - i, n - i) if reverse else (i, i - 1)
        row = partial(lax.dynamic_index_in_dim, sums, axis=axis, allow_negative_indices=False)
        sums_i = row(before) + row(i)
        return lax.dynamic_update_index_in_dim(sums, sums_i, i, axis, allow_negative_indices=False)

    return lax.fori_loop(1, n, add, g)


@cumsum.defjvp
def _cumsum_jvp(axis, reverse, primals, tangents):
    """Nobody takes differences of a gradient's sums."""
    return cumsum(*primals, axis, reverse), lax.cumsum(*tangents, axis, reverse)
