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
    ("jax-linear-attention", "gradients", "packed_no_state"): (
        "The gate of a sequence's first token decays no state, and has the gradient 0. Here it has what "
        "rounding leaves of a sum back over the chunk, through the sequences behind: 3e-7 at most, which no "
        "training sees."
    ),
    ("fla-core", "forward", "masks"): DIFFERENCES,
    ("fla-core", "forward", "resets"): INFINITE,
}
