"""For candidates that are called in other ways: each adapter turns a function with FLA's call into another.

    check(kernel, adapter="plain,ungrouped,states=NHVK,tokens=HBTK")
    check(kernel, adapter=compose(plain, ungrouped, states("NHVK"), tokens("HBTK")))

are the same. The call goes through the adapters from left to right, results come back from right to left, and
each adapter reads a call of FLA's names and layouts. So layouts come last, `tokens` behind `states`, and
`renamed`, which only Python has, at the very end.

    plain, activated        inputs are activated before the call
    ungrouped               no grouped value heads
    unscaled, decays        no scale; decays in place of their logarithms
    always_l2norm, always_sigmoid      kernels that normalise, or take the sigmoid, whatever they are given
    unpacked, declines      declines packing; declines where the candidate raises
    segments, segment_ids   packing by the number of each token's sequence
    flattened, padded       a batch as one packed row; sequences of whole chunks
    pooled                  states in a pool
    states, tokens, head_first         the order of axes
    renamed                 other names, or fewer

An adapter of one's own is a function of a function, too; it raises NotImplementedError for what the
candidate cannot do. The functions take arrays by name, as `chunk_kda` and `chunk_kda_fwd` do, and return o
and the final state, or the fields of `ChunkKDAForward`, as a tuple or a dict.

Arrays are NumPy's, or JAX's under `jax.vjp`: a gradient of `adapter(kernel)` is one of the kernel. So an
adapter uses what both have (`swapaxes`, `reshape`, `x[...]`), never `np.asarray` of floats. Integers
(`cu_seqlens`) have known values.
"""

from functools import partial, reduce

from .inputs import (
    activated,
    always_l2norm,
    always_sigmoid,
    decays,
    declines,
    renamed,
    ungrouped,
    unpacked,
    unscaled,
)
from .layouts import flattened, padded, pooled, segments, states, tokens


def compose(*adapters):
    """One adapter of several: a call goes through them from the first to the last."""
    return lambda fn: reduce(lambda inner, adapter: adapter(inner), reversed(adapters), fn)


__all__ = [
    "activated",
    "always_l2norm",
    "always_sigmoid",
    "compose",
    "decays",
    "declines",
    "flattened",
    "head_first",
    "of",
    "padded",
    "plain",
    "pooled",
    "renamed",
    "segment_ids",
    "segments",
    "states",
    "tokens",
    "ungrouped",
    "unpacked",
    "unscaled",
]

# For an op with the recurrence's arguments alone (scale, initial_state, output_final_state, cu_seqlens).
plain = compose(activated(), renamed(chunk_size=None), states("NHKV"))
head_first = tokens("BHTK")
segment_ids = segments(0, states=False)

WORDS = {
    "plain": plain,
    "ungrouped": ungrouped,
    "unscaled": unscaled,
    "decays": decays,
    "always_l2norm": always_l2norm,
    "always_sigmoid": always_sigmoid,
    "unpacked": unpacked,
    "segment_ids": segment_ids,
    "flattened": flattened,
    "head_first": head_first,
    "pooled": pooled(),
}
WORDS_WITH_VALUES = {
    "activated": activated,
    "states": states,
    "tokens": tokens,
}
WORDS_WITH_NUMBERS = {"segments": segments, "padded": padded}
EXPECTED = ", ".join([*WORDS, "activated=beta", "states=NHVK", "tokens=HBTK", "segments=1", "padded=64"])


LAYOUTS = ("pooled", "states", "tokens", "head_first")  # each reads a call in FLA's layout: they come last


def of(words):
    """The adapter that comma-separated words name, such as "plain,ungrouped,tokens=HBTK"."""
    names = [word.strip().partition("=")[0] for word in words.split(",")]
    places = [1 + LAYOUTS.index(name) if name in LAYOUTS else 0 for name in names]
    if places != sorted(places):
        raise ValueError(
            f"adapter: expected {', '.join(LAYOUTS)} in this order behind all else, got {words!r}"
        )
    return compose(*map(partial(_of_word, words=words), words.split(",")))


def _of_word(word, words):
    name, _, value = word.strip().partition("=")
    if not value and name in WORDS:
        return WORDS[name]
    if value and name in WORDS_WITH_VALUES:
        return WORDS_WITH_VALUES[name](value)
    if value.isdigit() and name in WORDS_WITH_NUMBERS:
        return WORDS_WITH_NUMBERS[name](int(value))
    raise ValueError(f"adapter: expected words of {EXPECTED}, or package.module:function, got {words!r}")
