"""Every trick for XLA's CPU backend, each with what XLA does otherwise and in which JAX.

A trick is called where it takes effect, and changes results in the last bits at most. Where no JAX is named,
it is for all that are supported.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Before JAX 0.11 XLA widens all of a 16-bit array at every update: what is updated chunk by chunk is kept
# wide there, and rounded at the end.
UPDATES_WIDEN = jax.__version_info__ < (0, 11)


def uninlined(f):
    """`f` compiled by itself on a CPU.

    XLA neither fuses it with its surroundings nor computes it twice. A barrier is not enough before JAX 0.11:
    XLA drops barriers before it fuses. The attribute is undocumented, so only CPUs are asked.
    """
    call = jax.jit(f)

    def on_cpu(*args):
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return functools.wraps(f)(lambda *args: lax.platform_dependent(*args, cpu=on_cpu, default=f))


@uninlined
def materialize(x):
    """x itself, an array or a tuple of them. XLA makes it anew for everything that reads it otherwise."""
    return x


def barrier(x):
    """`materialize` without the call: enough from JAX 0.11 on; before, XLA fuses across it."""
    return lax.optimization_barrier(x)


@uninlined
def sliced(x, i):
    """Entry i of x [N, ...], as [1, ...], read by itself. XLA copies all of x at every chunk where it does
    not see that the entry has been read before its place is written."""
    return lax.dynamic_slice_in_dim(x, i, 1)


def hidden(x, start):
    """x and the place where it is sliced. Before JAX 0.11 XLA widens a 16-bit array whole, ahead of the scan,
    unless the slice hides it."""
    return lax.optimization_barrier((x, start))


@uninlined
def transposed(x):
    """The transpose of x [..., X, K], as a copy. XLA runs a product of a transposed left operand on one core,
    and is slow where it fuses the copy with what makes x."""
    return jnp.swapaxes(x, -1, -2)


def matmul(x, y):
    """x y, of x [..., I, K] and y [..., K, J] in the arithmetic's dtype."""
    return _product("ik,kj->ij", x, y)


def matmul_nt(x, y):
    """x y^T, of x [..., I, K] and y [..., J, K]."""
    return _product("ik,jk->ij", x, y)


def matmul_tn(x, y):
    """x^T y, of x [..., K, I] and y [..., K, J]."""
    return matmul(transposed(x), y)


def dot(subscripts, x, y):
    """`einsum` at full precision, of operands in the arithmetic's dtype."""
    return jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)


def _product(axes, x, y):
    """The product of x and y by `axes`, over their leading axes, merged: JAX 0.11 aborts on operands of eight
    axes. The batch stays apart: merged with the heads, it could not be sharded over devices by heads."""
    lead = x.shape[:-2]
    merged = (lead[0], math.prod(lead[1:])) if lead and lead[0] > 1 else (math.prod(lead),)
    x, y = (z.reshape(*merged, *z.shape[-2:]) for z in (x, y))
    names = "bl"[-len(merged) :]
    left, right, out = axes.replace("->", ",").split(",")
    z = dot(f"{names}{left},{names}{right}->{names}{out}", x, y)
    return z.reshape(*lead, *z.shape[-2:])


def inner(x, y):
    """sum_k x_k y_k over the last axis, as a product with ones: XLA's own sum is ten times slower."""
    return dot("...k,k->...", x * y, jnp.ones(x.shape[-1], x.dtype))


def sum_rows(x):
    """The sum of x [..., X, K] over X, [..., K], as a product with ones: XLA's own sum is slow here, too."""
    return matmul(jnp.ones((*x.shape[:-2], 1, x.shape[-2]), x.dtype), x)[..., 0, :]


def product_of_two(x):
    """x [..., 2, K] multiplied over the axis of 2, [..., K], once. XLA would make a product anew for every
    row that it scales; before JAX 0.11 no barrier is left by then, but a reduction stands."""
    return barrier(jnp.prod(x, axis=-2))
