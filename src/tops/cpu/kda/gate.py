"""Activations of the raw inputs, and the chunk-local cumulative sum that FLA's contract returns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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


def kda_gate(g, A_log, dt_bias, lower_bound):
    """The log decay, in nats, of raw gates g [..., HV, K]; A_log [HV], dt_bias [HV * K], each may be None.

    lower_bound is None:  -exp(A_log) * softplus(g + dt_bias)
    else:                 lower_bound * sigmoid(exp(A_log) * (g + dt_bias))
    """
    g = g if dt_bias is None else g + dt_bias.reshape(g.shape[-2:])
    if lower_bound is None:
        return -jnp.exp(A_log)[:, None] * jax.nn.softplus(g)
    return lower_bound * jax.nn.sigmoid(g if A_log is None else jnp.exp(A_log)[:, None] * g)


def activate(q, k, g, beta, A_log, dt_bias, activations):
    """(q, k, g, beta) as the recurrence takes them; in token layout, in the accumulator dtype."""
    if activations.qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    if activations.gate:
        g = kda_gate(g, A_log, dt_bias, activations.lower_bound)
    if activations.beta_scale is not None:
        beta = activations.beta_scale * jax.nn.sigmoid(beta)
    return q, k, g, beta
