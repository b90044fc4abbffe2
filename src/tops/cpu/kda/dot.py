"""The one way to contract, at full precision, and the one way to round an intermediate."""

import math

import jax.numpy as jnp
from jax import lax


def dot(subscripts, x, y, parts=1):
    """`einsum(subscripts, x, y)` of operands that are in the accumulator dtype.

    The subscripts start with "...", for the leading axes. One index is contracted. With `parts` (a power of
    two), its sum is taken over that many parts, which are then added in pairs: a shorter sum rounds less.
    Where the axis does not divide, fewer parts are taken.
    """
    axes, out = subscripts.replace("...", "").split("->")
    x_axes, y_axes = axes.split(",")
    (contracted,) = (set(x_axes) & set(y_axes)) - set(out)
    parts = math.gcd(parts, x.shape[x_axes.index(contracted) - len(x_axes)])
    lead = jnp.broadcast_shapes(x.shape[: x.ndim - len(x_axes)], y.shape[: y.ndim - len(y_axes)])
    # One leading axis for all: JAX 0.11 aborts on a product of operands with eight axes.
    z = jnp.einsum(
        f"lp{x_axes},lp{y_axes}->lp{out}",
        *(_split(x, x_axes, contracted, parts, lead), _split(y, y_axes, contracted, parts, lead)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=x.dtype,
    )
    while parts > 1:
        parts //= 2
        z = z[:, :parts] + z[:, parts:]
    return z.reshape(*lead, *z.shape[2:])


def _split(x, axes, contracted, parts, lead):
    """x [..., *axes], its leading axes as one and its contracted axis cut into parts: [L, parts, *axes]."""
    own = x.shape[x.ndim - len(axes) :]
    x = jnp.broadcast_to(x, (*lead, *own)).reshape(-1, *own)
    axis = 1 + axes.index(contracted)
    x = x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 1)


def storage(dtype):
    """How an intermediate is stored: rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        # The barrier keeps XLA from dropping the two conversions as excess precision.
        return x if dtype is None else lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)

    return store
