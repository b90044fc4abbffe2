"""How an intermediate is stored."""


def storage(dtype):
    """Rounded to `dtype` and widened again, or kept as it is for None."""

    def store(x):
        return x if dtype is None else x.astype(dtype).astype(x.dtype)

    return store
