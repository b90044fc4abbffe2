"""NumPy's arrays to a candidate's and back; torch is imported only where its tensors are asked for."""

import jax.numpy as jnp
import numpy as np

KINDS = ("jax", "numpy", "torch")


def to_kind(x, kind):
    """A NumPy array as an array of `kind`; anything else as it is."""
    if not isinstance(x, np.ndarray) or kind == "numpy":
        return x
    return to_torch(x) if kind == "torch" else jnp.asarray(x)


def as_tuple_or_dict(made):
    """What a candidate returned, a NamedTuple as a dict."""
    made = made._asdict() if hasattr(made, "_asdict") else made
    if not isinstance(made, tuple | list | dict):
        raise TypeError(f"expected a tuple or a dict of arrays from the kernel, got {type(made).__name__}")
    return made


def to_torch(x):  # pragma: no cover, torch: tests/fla/test_kit.py
    """On the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if x.dtype == jnp.bfloat16:  # as bits: to widen a NaN and round it again may warn, and change it
        return torch.tensor(x.view(np.int16), device=device).view(torch.bfloat16)
    return torch.tensor(x, device=device)


def to_numpy(x):
    """An array of any library as NumPy's, None as None. bfloat16 comes as ml_dtypes'."""
    if x is None:
        return None
    return from_torch(x) if type(x).__module__.partition(".")[0] == "torch" else np.asarray(x)


def from_torch(x):  # pragma: no cover, torch: tests/fla/test_kit.py
    import torch

    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(jnp.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
