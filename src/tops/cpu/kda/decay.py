"""Decays as products over token ranges, built by doubling; never a difference of cumulative sums.

`a = exp(g)` is the decay of one token, and `D(i<-j) = a_{j+1} * ... * a_i` the decay from token j to
token i. Cut a chunk into blocks of s tokens and keep, for every block,

    rows_i = x_i * D(i <- block start)     what x_i sees of the state that enters the block
    cols_j = x_j * D(block end <- j)       what is left of x_j when the block ends
    total  = D(block end <- block start)

Two neighbouring blocks meet in the middle, and there `D(i<-j) = D(i<-middle) * D(middle<-j)`: the
scores between the rows of the second and the columns of the first are one matrix product. Then the
two become one block of 2s: the second's rows and the first's columns take one more factor. Every factor
lies in [0, 1]: nothing overflows, nothing cancels, and a gate of -inf is an exact zero.
"""

import jax.numpy as jnp


def halves(x, s):
    """[..., C, X], blocks of s tokens, as the first and the second of each pair: [..., C/2s, s, X]."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, s, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def join(first, second):
    """`halves` undone."""
    pairs = jnp.stack([first, second], axis=-3)
    return pairs.reshape(*pairs.shape[:-4], -1, pairs.shape[-1])


def double(rows, cols, total, s):
    """From blocks of s tokens to blocks of 2s.

    rows [..., R, C, K] (R operands that share the decays), cols [..., C, K], total [..., C/s, K].
    """
    row_1, row_2 = halves(rows, s)
    col_1, col_2 = halves(cols, s)
    total_1, total_2 = halves(total, 1)  # [..., C/2s, 1, K]
    rows = join(row_1, row_2 * total_1[..., None, :, :, :])
    cols = join(col_1 * total_2, col_2)
    return rows, cols, (total_1 * total_2)[..., 0, :]


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
