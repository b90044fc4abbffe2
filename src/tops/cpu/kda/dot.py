"""The one way to contract, at full precision, and the one way to round an intermediate."""

import math

import jax.numpy as jnp
from jax import lax


def dot(subscripts, x, y, parts=1):
    """`einsum(subscripts, x, y)` of operands that are in the accumulator dtype.

    One index is contracted. With `parts` (a power of two), its sum is taken over that many parts, which are
    then added in pairs: a shorter sum rounds less. Where the axis does not divide, fewer parts are taken.
    """
    (x_axes, y_axes), out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    (contracted,) = (set(x_axes) & set(y_axes)) - set(out)
    x_axis, y_axis = x_axes.index(contracted) - len(x_axes), y_axes.index(contracted) - len(y_axes)
    parts = math.gcd(parts, x.shape[x_axis])
    terms = [
        jnp.einsum(subscripts, *pair, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)
        for pair in zip(jnp.split(x, parts, x_axis), jnp.split(y, parts, y_axis), strict=True)
    ]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def storage(dtype):
    """How an intermediate is stored: rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        # The barrier keeps XLA from dropping the two conversions as excess precision.
        return x if dtype is None else lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)

    return store
