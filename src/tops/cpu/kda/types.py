"""The types of public arguments: their shapes and dtypes are in the docstrings, and held by `checks`."""

from collections.abc import Sequence

import jax
import numpy as np

Array = jax.Array | np.ndarray
Scalar = float | Array  # a number, or a scalar array whose value is known
Sequences = Array | Sequence[int]  # cu_seqlens
DType = str | type | np.dtype  # by name, NumPy's or JAX's
