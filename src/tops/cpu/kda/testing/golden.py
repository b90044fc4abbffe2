"""What a case's tensors are, in float64, and what our own forward makes of them in a candidate's dtype."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from typing import NamedTuple

import jax
import numpy as np

from .. import chunk_kda, chunk_kda_fwd
from ..activations import log_decay
from .compare import largest_sum
from .tiers import EXACT, farthest, tiered

STAGES = dict(
    g="0 gate",
    Aqk="1 intra",
    Akk="1 intra",
    w="2 WY",
    u="2 WY",
    qg="2 WY",
    kg="2 WY",
    h="3 state",
    v_new="3 state",
    final_state="3 state",
    o="4 output",
)
# A case runs once: most of its time is compilation.
FAST_COMPILE = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # a flag that later builds of XLA refuse
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False


class Truth(NamedTuple):
    """The inputs of a case, its tensors in float64, and the same as our forward makes them with rounding; and
    the `largest_sum` of its gates."""

    inputs: dict
    golden: dict
    ours: dict
    gate_sum: float = 0.0


@lru_cache(maxsize=32)
def truth(case, dtype, seed=0, tier=EXACT):
    """`Truth` of a case for a candidate of `dtype`, in a tier of arithmetic."""
    return judge(case, case.inputs(dtype, seed), np.dtype(dtype), tier)


def judge(case, inputs, dtype, tier=EXACT):
    """`Truth` of inputs at hand.

    Our forward is the yardstick with `storage_dtype`, rounding where a kernel that stores `dtype` must. For a
    float64 candidate the golden itself errs by as much as the candidate, and the two may err apart: the
    yardstick there is twice the error of the float32 forward, scaled by the ratio of the precisions, 2**-29.
    """
    rounded = (cast(inputs, np.float32), np.float32) if dtype == np.float64 else (inputs, dtype)
    with ThreadPoolExecutor() as pool:  # two programs to compile
        golden, ours = pool.map(
            partial(forward, case),
            *((cast(inputs, np.float64), rounded[0]), (None, rounded[1]), (EXACT, tier)),
        )
    others = [forward(case, *rounded, tier, grid) for grid in tier.grids[1:]]
    ours = farthest(golden, [ours, *others])
    if dtype == np.float64:
        with np.errstate(invalid="ignore"):  # -inf - -inf, where the cumulative sum of resets is not judged
            ours = {name: golden[name] + 2.0**-28 * (x - golden[name]) for name, x in ours.items()}
    return Truth(inputs, golden, ours, largest_sum(case, gates(case, inputs)))


def gates(case, inputs):
    """The log decays of a case, in float64."""
    g = np.asarray(inputs["g"], np.float64)
    if not case.is_gate_raw:
        return g
    with jax.enable_x64(True):
        A_log, dt_bias = (
            None if x is None else x.astype(np.float64) for x in map(inputs.get, ("A_log", "dt_bias"))
        )
        return np.asarray(log_decay(g, A_log, dt_bias, case.lower_bound))


def cast(inputs, dtype):
    return {name: x if name == "cu_seqlens" else x.astype(dtype) for name, x in inputs.items()}


@cache
def program(op, options, tier=EXACT):
    """One for all the cases that share options; it compiles once for those that share shapes."""
    op = partial(op, **dict(options))
    return jax.jit(lambda inputs, grid: tiered(op, *tier, grid)(**inputs), compiler_options=FAST_COMPILE)


def forward(case, inputs, storage_dtype=None, tier=EXACT, grid=1.0):
    """{tensor: float64} of our forward, on a CPU; states are [K, V]."""
    stages = not case.raw
    op = chunk_kda_fwd if stages else chunk_kda
    options = case.options(stages) | dict(chunk_size=case.chunk_size, storage_dtype=storage_dtype)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        made = program(op, tuple(options.items()), tier)(inputs, np.float32(grid))
    made = made._asdict() if stages else dict(zip(("o", "final_state"), made, strict=True))
    return case.standard(
        {name: np.asarray(made[name], np.float64) for name in STAGES if made.get(name) is not None}
    )
