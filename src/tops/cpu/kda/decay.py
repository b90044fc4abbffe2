"""Decays as products over token ranges, built by doubling; never a difference of cumulative sums.

`a = exp(g)` is the decay of one token, and `D(i<-j) = a_{j+1} * ... * a_i` the decay from token j to
token i. Cut a chunk into blocks of s tokens and keep, for every block,

    rows_i = x_i * D(i <- block start)     what x_i sees of the state that enters the block
    cols_j = k_j * D(block end <- j)       what is left of k_j when the block ends
    total  = D(block end <- block start)

Two neighbouring blocks meet in the middle, and there `D(i<-j) = D(i<-middle) * D(middle<-j)`: the
scores between the rows of the second and the columns of the first are one matrix product. Then the
two become one block of 2s: the second's rows and the first's columns take one more factor. Every factor
lies in [0, 1]: nothing overflows, nothing cancels, and a gate of -inf is an exact zero.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .dot import once, pick, spread_by_product


def halves(x, n):
    """x [..., X, K] cut into n blocks, as the first and the second half of each: [..., n, X/2n, K]."""
    pairs = x.reshape(*x.shape[:-2], n, 2, -1, x.shape[-1])
    return pick(pairs, -3, 0), pick(pairs, -3, 1)


def double(rows, cols, total):
    """From blocks of s tokens to n blocks of 2s.

    rows [..., R * C, K] (R rows a token), cols [..., C, K], total [..., 2n, K].
    """
    pairs = total.reshape(*total.shape[:-2], -1, 2, total.shape[-1])
    first, second = pick(pairs, -2, 0), pick(pairs, -2, 1)
    rows = _scale_half(rows, 1, first)
    cols = _scale_half(cols, 0, second)
    return rows, cols, _product_of(pairs)


@jax.custom_jvp
def _product_of(pairs):
    """The total of two blocks: pairs [..., n, 2, K]. Behind the barrier XLA computes it once, not anew for
    every row that it scales; before JAX 0.11 there is no barrier left by then, but a reduction stands."""
    return lax.optimization_barrier(jnp.prod(pairs, axis=-2))


@_product_of.defjvp
def _product_of_jvp(primals, tangents):
    first, second = (pick(*primals, -2, i) for i in range(2))
    d_first, d_second = (pick(*tangents, -2, i) for i in range(2))
    return _product_of(*primals), first * d_second + d_first * second


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scale_half(x, which, factor):
    """x [..., X, K] in n blocks, the first (0) or second (1) half of each times factor [..., n, K]."""
    pairs = x.reshape(*factor.shape[:-1], 2, -1, x.shape[-1])
    factor = factor[..., None, None, :]
    # XLA drops the zeros. They keep mask and ones in the scan over chunks, which, split for a gradient, would
    # else make them once, at full size, and read them at every chunk. A NumPy mask takes no kernel to make.
    zeros = 0 * factor.astype(jnp.int32)
    half, ones = np.arange(2)[:, None, None] + zeros, (1 + zeros).astype(factor.dtype)
    return (pairs * jnp.where(half == which, factor, ones)).reshape(x.shape)


@_scale_half.defjvp
def _scale_half_jvp(which, primals, tangents):
    """The product rule, on the half that is scaled alone."""
    (x, factor), (dx, dfactor) = primals, tangents
    half = halves(x, factor.shape[-2])[which]
    scaled = half * spread_by_product(dfactor[..., None, :], -2, half.shape[-2])
    both = (scaled, jnp.zeros_like(scaled))
    scaled = jnp.concatenate(both if which == 0 else both[::-1], axis=-2).reshape(x.shape)
    dx = _scale_half(dx, which, factor) + scaled
    # The gradient of a level would be made anew for every level before it. At one level of three it is made
    # once: to make it anew for two costs less than to write it and read it again.
    if factor.shape[-2] in (4, 32):
        dx = once(dx)
    return _scale_half(x, which, factor), dx


def from_cumsum(gk, use_exp2):
    """The decays of a chunk from the cumulative sum of its log decays, as a stage on its own receives it.

    gk [..., C, K], log2 with `use_exp2`, else nats. Returns D(i<-0) [..., C, K], D(C<-j) [..., C, K] and
    D(C<-0) [..., K].
    """
    exp = jnp.exp2 if use_exp2 else jnp.exp
    last = gk[..., -1:, :]
    return exp(gk), exp(last - gk), exp(last)[..., 0, :]


def of_tokens(gk, use_exp2):
    """The decay a_i of each token, exp(gk_i - gk_{i-1}), from the same cumulative sum."""
    exp = jnp.exp2 if use_exp2 else jnp.exp
    return exp(jnp.diff(gk, axis=-2, prepend=jnp.zeros_like(gk[..., :1, :])))
