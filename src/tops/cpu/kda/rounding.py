"""How an intermediate is stored."""

import jax.numpy as jnp
from jax import lax


def storage(dtype):
    """Rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        return x if dtype is None else x.astype(dtype).astype(x.dtype)

    return store


def stored_sum(x, dtype):
    """The sum of x over the last axis as Triton makes it of numbers of `dtype`: in float32 of bfloat16, while
    every partial sum of float16 is rounded to it.

    One number after the other, as Triton's interpreter sums; on a GPU the order is that of threads.
    """
    store = storage(dtype)
    if dtype != jnp.float16:
        return store(x).sum(-1)
    terms = jnp.moveaxis(store(x), -1, 0)
    return lax.scan(lambda total, term: (store(total + term), None), jnp.zeros_like(terms[0]), terms)[0]


def beta_k_storage(dtype, beta_dtype):
    """How FLA's kernels hold beta k before they decay it: they multiply a beta of k's 16 bits in 16 bits."""
    return storage(dtype if beta_dtype == dtype else None)
