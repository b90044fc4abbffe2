"""What adapters do alike to NumPy's arrays and to JAX's."""

import jax.numpy as jnp
import numpy as np

from ...chunk_fwd import ChunkKDAForward

TOKEN_FIELDS = ("o", "g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new")


def namespace(x):
    """numpy or jax.numpy, whichever x is an array of."""
    return np if isinstance(x, np.ndarray) else jnp


def wide(x):
    """x in the arithmetic's dtype, promote_types(x.dtype, float32)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def same_kind(x, like):
    """x, which JAX made of `like`, as NumPy's where that was: a candidate is given what it asked for."""
    return np.asarray(x) if isinstance(like, np.ndarray) else x


def of_kind(x, like):
    """NumPy's integers x as an array of the kind of `like`."""
    return x if isinstance(like, np.ndarray) else jnp.asarray(x)


def changed(made, **changes):
    """What a candidate returned, with a function applied to each field of `changes` that is there."""
    is_dict = isinstance(made, dict)
    fields = made if is_dict else dict(zip(ChunkKDAForward._fields, made, strict=False))
    fields = {
        name: changes[name](x) if name in changes and x is not None else x for name, x in fields.items()
    }
    return fields if is_dict else tuple(fields.values())


def changed_tokens(made, change):
    """The same for every field [B, T, HV, ...]."""
    return changed(made, **dict.fromkeys(TOKEN_FIELDS, change))
