"""The one way to contract, at full precision, to pick from an axis or repeat along it, and to round."""

import functools
import math
import operator
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

PARTS = 2  # a sum over the channels of a head is taken in two halves: a shorter sum rounds less


def alone(f):
    """`f`, which XLA compiles by itself on a CPU: it fuses nothing of it with what stands around, and makes
    it once. A barrier does less: before JAX 0.11 none is left when XLA fuses. The backends of other platforms
    are not asked to take a call."""
    call = jax.jit(f)

    def on_cpu(*args):
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return functools.wraps(f)(lambda *args: lax.platform_dependent(*args, cpu=on_cpu, default=f))


def dot(subscripts, x, y):
    """`einsum(subscripts, x, y)` of operands that are in the accumulator dtype.

    The subscripts start with "...", for the leading axes.
    """
    axes, out = subscripts.replace("...", "").split("->")
    x_axes, y_axes = axes.split(",")
    x_own, y_own = x.shape[x.ndim - len(x_axes) :], y.shape[y.ndim - len(y_axes) :]
    lead = jnp.broadcast_shapes(x.shape[: x.ndim - len(x_axes)], y.shape[: y.ndim - len(y_axes)])
    # One leading axis for all: JAX 0.11 aborts on a product of operands with eight axes. A batch stays by
    # itself: with its heads in one axis it could not be sharded over devices by heads.
    merged = (lead[0], math.prod(lead[1:])) if lead and lead[0] > 1 else (math.prod(lead),)
    names = "bl"[-len(merged) :]
    z = _product(
        f"{names}{x_axes},{names}{y_axes}->{names}{out}",
        jnp.broadcast_to(x, (*lead, *x_own)).reshape(*merged, *x_own),
        jnp.broadcast_to(y, (*lead, *y_own)).reshape(*merged, *y_own),
    )
    return z.reshape(*lead, *z.shape[len(merged) :])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)


@_product.defjvp
def _product_jvp(subscripts, primals, tangents):
    """The product rule. The gradient of y is a product of a transposed left operand: a copy of x, or of the
    cotangent, is transposed for it (see `transposed`)."""
    (x, y), (dx, dy) = primals, tangents
    x_axes, y_axes, out = re.split(",|->", subscripts)
    if y_axes[-1] == out[-1]:
        dy = _product(f"{_swap(x_axes)},{y_axes}->{out}", transposed(x), dy)
    else:
        dy = transposed(_product(f"{y_axes},{x_axes}->{_swap(out)}", dy, x))
    return _product(subscripts, x, y), _product(subscripts, dx, y) + dy


def _swap(axes):
    return axes[:-2] + axes[-1] + axes[-2]


def inner(x, y):
    """sum_k x_k y_k over the last axis, as a product with ones: XLA's sum is slow, and so are products of
    single rows in a batch."""
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.einsum("...k,k->...", x * y, ones, precision=lax.Precision.HIGHEST)


def split_channels(x, parts):
    """x [..., X, K] with its channels in P parts, [..., P, X, K/P]; P is 1 for an odd K."""
    P = math.gcd(parts, x.shape[-1])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], P, -1), -2, -3)


def merge_channels(x):
    """`split_channels` undone."""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-2], -1)


@alone
def transposed(x):
    """The transpose of x [..., X, K], as a copy: XLA runs a product of a transposed left operand on one core,
    and is slow where it fuses the copy with what makes x."""
    return jnp.swapaxes(x, -1, -2)


@alone
def once(x):
    """x itself, an array or a tuple of them: what makes it is not made anew for everything that reads it."""
    return x


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_parts(z, axis):
    """The sum over channels, of what `dot` made of each of their parts."""
    return functools.reduce(operator.add, jnp.moveaxis(z, axis, 0))  # XLA's sum is slow


@sum_parts.defjvp
def _sum_parts_jvp(axis, primals, tangents):
    """The gradient repeats; that of the parts cut out one by one pads each."""
    return sum_parts(*primals, axis), tangents[0].sum(axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def pick(x, axis, i):
    """Entry i of an axis of x, counted from the last."""
    return lax.index_in_dim(x, i, x.ndim + axis, keepdims=False)


@pick.defjvp
def _pick_jvp(axis, i, primals, tangents):
    """The gradient selects: that of a slice pads, and XLA pads with a branch for every element."""
    (x,), (dx,) = primals, tangents
    entry = jnp.arange(x.shape[axis]).reshape(-1, *[1] * (-axis - 1))
    return pick(x, axis, i), jnp.where(entry == i, dx, 0).sum(axis)


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
