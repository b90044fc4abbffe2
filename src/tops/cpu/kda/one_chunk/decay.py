"""Decays as products over token ranges, built by doubling, and the adjoint of a doubling.

`a = exp(g)` is the decay of one token, and `D(i<-j) = a_{j+1} * ... * a_i` the decay from token j to token i.
Cut a chunk into blocks of s tokens and keep, for every block,

    rows_i = x_i * D(i <- block start)     what x_i sees of the state that enters the block
    cols_j = k_j * D(block end <- j)       what is left of k_j when the block ends
    total  = D(block end <- block start)

Two neighbours meet in the middle, where `D(i<-j) = D(i<-middle) * D(middle<-j)`: the scores between the rows
of the second and the columns of the first are one matrix product. Then the two become one block of 2s tokens.
Every factor lies in [0, 1]: nothing overflows, nothing cancels, and a gate of -inf is an exact zero.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from .xla import product_of_two, sum_rows


def halves(x, n):
    """x [..., X, K] cut into n blocks, as the first and the second half of each, [..., n, X/2n, K]."""
    pairs = x.reshape(*x.shape[:-2], n, 2, -1, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def double(rows, cols, total):
    """From blocks of s tokens to n blocks of 2s.

        rows_2 <- rows_2 total_1      cols_1 <- cols_1 total_2      total <- total_1 total_2

    rows [..., R * C, K] (R rows a token), cols [..., C, K], total [..., 2n, K].
    """
    pairs = total.reshape(*total.shape[:-2], -1, 2, total.shape[-1])
    total_1, total_2 = pairs[..., 0, :], pairs[..., 1, :]
    return scale_half(rows, 1, total_1), scale_half(cols, 0, total_2), product_of_two(pairs)


def double_backward(rows, cols, total, d_rows, d_cols, d_total):
    """The cotangents of what `double` was given, from those of what it made.

    d_total_1 = sum rows_2 d_rows_2 + d_total total_2      d_rows_2 <- d_rows_2 total_1
    d_total_2 = sum cols_1 d_cols_1 + d_total total_1      d_cols_1 <- d_cols_1 total_2
    """
    pairs = total.reshape(*total.shape[:-2], -1, 2, total.shape[-1])
    total_1, total_2 = pairs[..., 0, :], pairs[..., 1, :]
    n = total_1.shape[-2]
    d_total_1 = sum_rows(halves(rows, n)[1] * halves(d_rows, n)[1]) + d_total * total_2
    d_total_2 = sum_rows(halves(cols, n)[0] * halves(d_cols, n)[0]) + d_total * total_1
    d_total = jnp.stack([d_total_1, d_total_2], axis=-2).reshape(total.shape)
    return scale_half(d_rows, 1, total_1), scale_half(d_cols, 0, total_2), d_total


def scale_half(x, which, factor):
    """x [..., X, K] in n blocks, the first (0) or second (1) half of each times factor [..., n, K].

    A select, which XLA fuses into its readers; a concatenation of the halves it would write to memory.
    """
    pairs = x.reshape(*factor.shape[:-1], 2, -1, x.shape[-1])
    return (pairs * jnp.where(_half(which), factor[..., None, None, :], 1)).reshape(x.shape)


def add_to_half(x, which, y):
    """x [..., X, K] in n blocks, the first (0) or second (1) half of each plus y [..., n, X/2n, K]."""
    pairs = x.reshape(*y.shape[:-2], 2, *y.shape[-2:])
    return (pairs + jnp.where(_half(which), y[..., None, :, :], 0)).reshape(x.shape)


def _half(which):
    return np.arange(2)[:, None, None] == which


def from_start(a):
    """D(i<-0) [..., C, K], of the decays of the tokens, a [..., C, K]."""
    return jnp.cumprod(a, axis=-2)


def from_cumsum(gk, use_exp2):
    """The decays of a chunk from the cumulative sum of its log decays, all that a stage op on its own is
    given.

    gk [..., C, K], log2 with `use_exp2`, else nats. Returns D(i<-0) [..., C, K], D(C<-j) [..., C, K] and
    D(C<-0) [..., K].
    """
    exp = jnp.exp2 if use_exp2 else jnp.exp
    last = gk[..., -1:, :]
    return exp(gk), exp(last - gk), exp(last)[..., 0, :]


def ends_backward(d_in, d_out, d_decay):
    """The cotangent of the log decays g, from those of log D(i<-0), log D(C<-j) and log D(C<-0).

        d_g_i = sum_{j >= i} d_in_j + sum_{j < i} d_out_j + d_decay

    d_in, d_out [..., C, K], d_decay [..., K].
    """
    axis = d_in.ndim - 2
    earlier = jnp.concatenate([jnp.zeros_like(d_out[..., :1, :]), d_out[..., :-1, :]], axis)
    return lax.cumsum(d_in, axis, reverse=True) + lax.cumsum(earlier, axis) + d_decay[..., None, :]


def of_tokens(gk, use_exp2):
    """The decay a_i of each token, exp(gk_i - gk_{i-1}), from the same cumulative sum."""
    exp = jnp.exp2 if use_exp2 else jnp.exp
    return exp(jnp.diff(gk, axis=-2, prepend=jnp.zeros_like(gk[..., :1, :])))


def of_tokens_backward(d_g):
    """The cotangent of the cumulative sums, in nats, from that of the log decays: a difference, too."""
    return -jnp.diff(d_g, axis=-2, append=jnp.zeros_like(d_g[..., :1, :]))
