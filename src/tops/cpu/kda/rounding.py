"""How an intermediate is stored."""


def storage(dtype):
    """Rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        return x if dtype is None else x.astype(dtype).astype(x.dtype)

    return store


def beta_k_storage(dtype, beta_dtype):
    """How FLA's kernels hold beta k before they decay it: they multiply a beta of k's 16 bits in 16 bits."""
    return storage(dtype if beta_dtype == dtype else None)
