"""Why a library is flagged: the cause by (package, "forward" or "gradients", case), or without a case for all
that are."""

DIFFERENCES = (
    "A decay is the exponential of a difference of cumulative sums. Gates of -1000 take these to -1e4, and "
    "float32 loses the difference."
)
INFINITE = (
    "A decay is the exponential of a difference of cumulative sums, which is NaN behind a gate of -inf."
)
FAR_BELOW = (
    "A decay is the exponential of a difference of cumulative sums. Gates far below -5 make these large, and "
    "float32 loses the difference."
)
NEEDS_A_LOG = "It takes no raw gate without `A_log`."
SHIFTED = (
    "It counts the sequences that have tokens: behind an empty sequence, each reads the initial state of the "
    "one before, and its final state lies in that one's place."
)

WHY = {
    ("tokamax", "forward", "sigmoid_alone"): NEEDS_A_LOG,
    ("tokamax", "forward", "sigmoid"): SHIFTED,
    ("tokamax", "gradients", "sigmoid"): SHIFTED,
    ("jax-linear-attention", "forward", "strong"): FAR_BELOW,
    ("jax-linear-attention", "forward", "masks"): DIFFERENCES,
    ("jax-linear-attention", "forward", "resets"): INFINITE,
    ("fla-core", "forward", "masks"): DIFFERENCES,
    ("fla-core", "forward", "resets"): INFINITE,
}
