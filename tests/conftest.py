"""The suite's JAX: CPU only, float64 at hand, and one cache of compiled programs for all processes of a run.

The cache lies where pytest keeps its own and is kept between runs: `pytest --cache-clear` empties it.
"""

import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"
SETTINGS = dict(
    jax_platforms="cpu",
    jax_compilation_cache_dir=os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE)),
    jax_persistent_cache_min_compile_time_secs=0.0,
)
# The bounds of the suite are stated for float32 and float64 in one process: this one, not those it starts.
jax.config.update("jax_enable_x64", True)
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ.setdefault(name.upper(), str(value))

UNOPTIMIZED = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # a flag that later builds of XLA refuse
    UNOPTIMIZED += ["--xla_cpu_use_fusion_emitters=false"]


def pytest_addoption(parser):
    parser.addoption(
        "--unoptimized",
        action="store_true",
        help="compile without XLA's optimizations, four times as fast: for the tests of that mark",
    )


def pytest_configure(config):
    if config.getoption("--unoptimized"):  # XLA reads its flags at its first use, which is later
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *UNOPTIMIZED])


@pytest.fixture
def compiled_anew():
    """For what asks the compiler, not the program: nothing comes out of the cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
