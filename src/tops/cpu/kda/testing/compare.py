"""How far a tensor is from its golden, by which yardstick, where, and from where on.

A tensor is judged block by block, a block being one chunk of one sequence and one value head. In each block
two errors are held against what a right kernel may err by: the root mean square, which sees what is a little
wrong everywhere, and the maximum, which sees one wrong row. A fault of one row drowns in the norm of a whole
tensor, but not in the maximum of its block.

A right kernel may err by the largest of

    the error of our own forward, which rounds what it stores to the same dtype, in this block;
    its error relative to the golden over the whole tensor, times the golden of this block; for the root mean
        square three times that: the errors of a block can move together (with equal keys one score's rounding
        is every score's), so that a block is one throw of the dice, and ours may have been lucky;
    u times the larger of C and 3 G, of the golden: what sums over a chunk are rounded by;
    half an ulp of the dtype: so that a correctly rounded result has a ratio of at most 1.

u is half the epsilon of the arithmetic, C the chunk size or 64 (the candidate's own may be), and G the
largest sum of the case's gates over C tokens, in nats. A product over a chunk sums C terms: that is C u. And
a kernel takes its decays exp(G_i - G_j) from cumulative sums, whose roundings are errors of the exponent. On
an accelerator the sum is a scan by log steps: each level rounds, and the partial sums grow by two from level
to level, which makes u (G + G/2 + ...) = 2 u G. The sums are then multiplied by log2 e, one more rounding:
3 u G. A decay has two of them, 6 u G, and that is what passes, with a multiple of 2.

G counts gates down to -5, the strongest that `safe_gate` allows: such sums stay below 5 C, their errors below
1e-4. A stronger gate counts as none. Gates of -1000 are not for a sum, which they take to 1e4: a kernel that
sums them exceeds the yardstick a hundredfold. The tensor `g` is such a sum itself, and has no G in its
yardstick: relative to the sum, its error is below C u.

The whole tensor is held to the same, by its root mean square, without the factor of three. That factor stays,
and the maximum has it too, where nothing is stored in 16 bits: what errs are sums in one order, and a right
kernel takes another. With equal keys such errors live for a hundred tokens: chunks of 128 err 2.7 times ours.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .where import OF_CHUNKS, OF_HEADS, OF_SEQUENCES, STATES, not_finite, start_of

MULTIPLE = 2.0  # of the yardstick that a candidate may err by
SAFE = 5.0  # nats: the strongest gate that kernels sum
ROUNDINGS = 3  # of a cumulative sum relative to the largest: a scan by log steps, and a product
LUCK = 3  # standard deviations that one throw may be off, or one order of sums
MATRICES = ("Aqk", "dAqk", "dAkk")


class Block(NamedTuple):
    """Rows [start, stop) of row `row` of an array [rows, T, HV, channels]."""

    sequence: int
    chunk: int
    row: int
    start: int
    stop: int
    token: int  # of the sequence, the first


def ordinal(x):
    """Consecutive integers for consecutive floats of x's dtype."""
    bits = x.view(f"i{x.dtype.itemsize}").astype(np.int64)
    return np.where(bits < 0, -(bits & (2 ** (8 * x.dtype.itemsize - 1) - 1)), bits)


def half_ulp(x, dtype):
    """Half the distance of neighbours of `dtype` at x, or what float32 may flush to zero: an error of less is
    the dtype's, not the kernel's."""
    info = jnp.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(x), float(info.smallest_normal)))
    flushed = float(jnp.finfo(np.float32).smallest_normal) if dtype != np.float64 else 0.0
    return np.maximum(np.ldexp(0.5 * float(info.eps), exponent - 1), flushed)


def rms(x):
    """[HV] of x [n, HV, channels]."""
    return np.sqrt(np.mean(np.square(x), axis=(0, 2)))


def peak(x):
    return x.max(axis=(0, 2))


def blocks_of(case, tensor):
    """The blocks of a tensor in the layout of `rows_of`."""
    if tensor in OF_HEADS:
        return [Block(0, 0, 0, 0, 1, 0)]
    if tensor in OF_SEQUENCES:
        ends = [end - start for _, start, end in case.sequences]
        return [Block(n, -(-end // case.chunk_size), n, 0, 1, end) for n, end in enumerate(ends)]
    starts = [start for _, start, _ in case.sequences]
    blocks = []
    for i, (n, row, c, start, stop) in enumerate(case.chunks):
        token = start - starts[n]
        if tensor in OF_CHUNKS:
            start = c if case.cu_seqlens is None else i
            stop = start + 1
        blocks.append(Block(n, c, row, start, stop, token))
    return blocks


def rows_of(x, tensor, HV):
    """x as [rows, T, heads, channels]: a chunk's state, or a sequence's, is one row of K * V channels."""
    if tensor in OF_HEADS:
        x = x.reshape(1, 1, HV, -1)
    if tensor in OF_SEQUENCES:
        x = x[:, None]
    return x.reshape(*x.shape[:3], -1)


def judged_of(case, tensor, golden):
    """Where a tensor is judged: a matrix on and below the diagonal, since kernels leave the rest unwritten,
    `g` up to a gate of -inf, behind which a cumulative sum tells nothing."""
    if tensor in MATRICES:
        row = np.zeros(golden.shape[:2], int)
        for block in blocks_of(case, tensor):
            row[block.row, block.start : block.stop] = np.arange(block.stop - block.start)
        return np.broadcast_to(np.arange(golden.shape[-1]) <= row[..., None, None], golden.shape)
    return np.isfinite(golden)


def summed(case):
    """The tokens that a kernel sums over: a candidate's chunks may be its own."""
    return max(case.chunk_size, 64)


def largest_sum(case, g):
    """In nats: of the log decays g [B, T, HV, K], over `summed` tokens of a sequence, those from -5 on."""
    g = np.where(g < -SAFE, 0, g)
    sums = (
        g[row, first : min(first + summed(case), end)].sum(axis=0)
        for row, start, end in case.sequences
        for first in range(start, end, summed(case))
    )
    return max((float(-x.min()) for x in sums), default=0.0)


@np.errstate(invalid="ignore", over="ignore")  # what is not judged may be any bits
def compare(case, tensor, x, golden, ours, dtype, multiple=MULTIPLE, gate_sum=0.0, stored=None):
    """Judges x, the candidate's `tensor` of a case, all of the shape of `golden`; dtype is the candidate's,
    gate_sum the `largest_sum` of the case's gates, `stored` what the tensor may be rounded to, or dtype.

    Returns a dict: rel (Frobenius), max_abs, max_ulp, yardstick (rel of ours), ratio (of the worst block),
    worst (the position of its largest error), start (where the error starts; "" when it passes), not_finite
    ("NaN in sequences 1, 5, 7", or ""), and picture (the error over (token, channel) of the worst's sequence
    and head, of a state over (K, V); None when it passes).
    """
    blocks = blocks_of(case, tensor)
    if not blocks:  # no sequence has a token
        return dict(
            rel=0.0,
            max_abs=0.0,
            max_ulp=0,
            yardstick=0.0,
            ratio=0.0,
            worst={},
            start="",
            not_finite="",
            picture=None,
        )
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    stored = dtype if stored is None else stored
    ulps = _ulps(x, golden, stored)
    judged = np.ones(golden.shape, bool)
    if tensor in ("g", *MATRICES):
        judged = judged_of(case, tensor, golden)
    x, golden, ours = (
        rows_of(np.where(judged, np.asarray(y, np.float64), 0), tensor, case.HV) for y in (x, golden, ours)
    )
    error, own = np.abs(x - golden), np.abs(ours - golden)
    finite = not_finite(blocks, x, golden)
    error = np.where(np.isfinite(error), error, np.inf)
    floor, golden = half_ulp(golden, stored), np.abs(golden)
    inside = [(block.row, slice(block.start, block.stop)) for block in blocks]
    whole = [np.concatenate([y[where].ravel() for where in inside]) for y in (error, own, golden)]
    rel, yardstick = (float(_over(_norm(y), _norm(whole[2]))) for y in whole[:2])
    terms = summed(case) if tensor == "g" else max(summed(case), ROUNDINGS * gate_sum)
    sums = terms * float(jnp.finfo(wide).eps) / 2
    pooled = max(sums, LUCK * yardstick if np.isfinite(yardstick) else 0)
    order = LUCK if dtype == wide else 1
    pooled_peak = order * float(_over(whole[1].max(), whole[2].max())) if np.isfinite(yardstick) else 0
    pooled_peak = max(sums, pooled_peak)
    ratios, limits = [], []
    for where in inside:
        e, y, G, f = (z[where] for z in (error, own, golden, floor))
        evenly = np.max([rms(y), pooled * rms(G), rms(f)], axis=0)
        at_most = np.max([peak(y), pooled * rms(G), pooled_peak * peak(G), peak(f)], axis=0)
        ratios.append(np.maximum(_over(rms(e), evenly), _over(peak(e), at_most)))
        limits.append(multiple * at_most)
    ratios = np.array(ratios)  # [blocks, HV]
    norms = [_norm(y) for y in (*whole, np.concatenate([floor[where].ravel() for where in inside]))]
    ratio = max(float(ratios.max()), float(_over(norms[0], max(order * norms[1], sums * norms[2], norms[3]))))

    i, head = np.unravel_index(np.argmax(ratios), ratios.shape)
    block = blocks[i]
    rows = error[block.row, block.start : block.stop, head]
    offset, channel = np.unravel_index(np.argmax(rows), rows.shape)
    worst = dict(sequence=block.sequence, token=block.token + offset, head=head, channel=channel)
    worst = {name: int(n) for name, n in (worst | dict(chunk=block.chunk, offset=offset)).items()}
    if tensor in STATES:
        worst["channel"] = divmod(worst["channel"], case.V)
    if tensor in OF_HEADS + OF_SEQUENCES:  # of no token
        where = ("head", "channel") if tensor in OF_HEADS else ("sequence", "head", "channel")
        worst = {name: worst[name] for name in where}
    start, picture = "", None
    if not ratio <= multiple:
        start = "everywhere, a little"
        if (ratios > multiple).any():
            start = start_of(case, tensor, blocks, ratios > multiple, error, limits)
        of_sequence = [b for b in blocks if b.sequence == block.sequence]
        picture = error[block.row, of_sequence[0].start : of_sequence[-1].stop, head]
        if tensor in STATES:
            picture = rows.reshape(-1, case.V)
        if tensor in OF_HEADS:
            picture = None
    return dict(
        rel=rel,
        max_abs=float(whole[0].max()),
        max_ulp=int(max((ulps[judged]).max(initial=0), 0)),
        yardstick=yardstick,
        ratio=ratio,
        worst=worst,
        start=start,
        not_finite=finite,
        picture=picture,
    )


def _norm(x):
    """Without BLAS, whose threads cost more than they gain here."""
    return np.sqrt(np.sum(np.square(x)))


def _over(x, y):
    """x / y; 0 where x is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x == 0, 0.0, np.divide(x, y))[()]


def _ulps(x, golden, dtype):
    """Floats of `dtype` between x and the golden, -1 where one is not finite."""
    x, golden = (np.asarray(np.asarray(y, np.float64).astype(dtype)) for y in (x, golden))
    finite = np.isfinite(x.astype(np.float64)) & np.isfinite(golden.astype(np.float64))
    x, golden = ordinal(x), ordinal(golden)
    apart = (x < 0) != (golden < 0)  # their difference may overflow
    steps = np.where(
        apart, np.minimum(np.abs(x), 2**62) + np.minimum(np.abs(golden), 2**62), np.abs(x - golden)
    )
    return np.where(finite, steps, -1)
