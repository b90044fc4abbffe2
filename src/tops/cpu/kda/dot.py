"""The one way to contract, at full precision, to repeat along an axis, and to round an intermediate."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

PARTS = 2  # a sum over the channels of a head is taken in two halves: a shorter sum rounds less


def dot(subscripts, x, y):
    """`einsum(subscripts, x, y)` of operands that are in the accumulator dtype.

    The subscripts start with "...", for the leading axes.
    """
    axes, out = subscripts.replace("...", "").split("->")
    x_axes, y_axes = axes.split(",")
    x_own, y_own = x.shape[x.ndim - len(x_axes) :], y.shape[y.ndim - len(y_axes) :]
    lead = jnp.broadcast_shapes(x.shape[: x.ndim - len(x_axes)], y.shape[: y.ndim - len(y_axes)])
    # Two leading axes for all: JAX 0.11 aborts on a product of operands with eight axes. The first stays by
    # itself: a batch and its heads in one axis could not be sharded over devices by heads.
    two = (lead[0] if lead else 1, -1)
    z = jnp.einsum(
        f"bl{x_axes},bl{y_axes}->bl{out}",
        jnp.broadcast_to(x, (*lead, *x_own)).reshape(*two, *x_own),
        jnp.broadcast_to(y, (*lead, *y_own)).reshape(*two, *y_own),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )
    return z.reshape(*lead, *z.shape[2:])


def split_channels(x):
    """x [..., X, K] with its channels in P parts, [..., P, X, K/P]; P is 1 for an odd K."""
    P = math.gcd(PARTS, x.shape[-1])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], P, -1), -2, -3)


def merge_channels(x):
    """`split_channels` undone."""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


def sum_parts(z, axis):
    """The sum over channels, of what `dot` made of each of their parts."""
    return functools.reduce(operator.add, jnp.moveaxis(z, axis, 0))  # XLA's sum is slow


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def spread(x, axis, n):
    """x, of length 1 along `axis` (-1 or -2), repeated n times along it."""
    return jnp.broadcast_to(x, (*x.shape[:-2], *((x.shape[-2], n) if axis == -1 else (n, x.shape[-1]))))


@spread.defjvp
def _spread_jvp(axis, n, primals, tangents):
    return spread(*primals, axis, n), spread_by_product(*tangents, axis, n)


def spread_by_product(x, axis, n):
    """`spread` for tangents: the gradient is a product with ones, where XLA's sum over an axis is slow."""
    if axis == -1:
        return dot("...io,...oj->...ij", x, jnp.ones((1, n), x.dtype))
    return dot("...io,...oj->...ij", jnp.ones((n, 1), x.dtype), x)


def storage(dtype):
    """How an intermediate is stored: rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        return x if dtype is None else x.astype(dtype).astype(x.dtype)

    return store
