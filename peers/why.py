"""Why a library is flagged: the cause by (package, "forward" or "gradients", case), or without a case for all
that are."""

DIFFERENCES = (
    "A decay is the exponential of a difference of cumulative sums. Gates of -1000 take these to -1e4, and "
    "float32 loses the difference."
)
INFINITE = (
    "A decay is the exponential of a difference of cumulative sums, which is NaN behind a gate of -inf."
)

WHY = {
    ("jax-linear-attention", "forward", "masks"): DIFFERENCES,
    ("jax-linear-attention", "forward", "resets"): INFINITE,
    ("fla-core", "forward", "masks"): DIFFERENCES,
    ("fla-core", "forward", "resets"): INFINITE,
}
