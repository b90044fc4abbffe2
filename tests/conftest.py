"""CPU only, and float64 available: the bounds of the suite are stated for both dtypes in one process."""

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
