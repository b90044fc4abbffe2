"""FLA's own kernels on numpy arrays: compiled where there is CUDA, in Triton's interpreter elsewhere.

float32 products are taken in float32, not TF32, in both, and a kernel has one configuration: the interpreter
has nothing to time, and to compile and time a dozen is all that the tests would do on a GPU. The interpreter
needs three more changes around FLA, none of them to what a kernel computes:

    TRITON_INTERPRET=1           before Triton is imported
    no `gather`                  the interpreter has none; FLA has a path without
    a range of `Index`           FLA calls `.to` on a loop index, which is a plain int there

Its bfloat16 arithmetic is wrong: without CUDA, float16 alone shows the rounding of what FLA stores.
"""

import builtins
import os

import jax.numpy as jnp
import numpy as np
import pytest

from tops.cpu.kda.testing.arrays import to_kind, to_numpy

WHY = "parity with FLA needs torch, triton and fla-core"
torch = pytest.importorskip("torch", reason=WHY)
CUDA = torch.cuda.is_available()
STORAGE_DTYPES = [np.float16, jnp.bfloat16] if CUDA else [np.float16]
os.environ |= {"TRITON_F32_DEFAULT": "ieee"} if CUDA else {"TRITON_INTERPRET": "1"}
triton = pytest.importorskip("triton", reason=WHY)


class Index(int):
    def to(self, dtype):
        return self


def only_one_configuration(tune):
    """The largest blocks for the interpreter; what fits every GPU where kernels are compiled."""

    def init(self, fn, arg_names, configs, *args, **kwargs):
        fits = min(configs, key=lambda config: (abs(config.num_warps - 4), config.num_stages))
        tune(self, fn, arg_names, [fits if CUDA else configs[-1]], *args, **kwargs)

    return init


with pytest.MonkeyPatch.context() as patch:
    autotuner = triton.runtime.autotuner.Autotuner
    patch.setattr(autotuner, "__init__", only_one_configuration(autotuner.__init__))
    kda = pytest.importorskip("fla.ops.kda", reason=WHY)
    intra = pytest.importorskip("fla.ops.kda.chunk_intra")
    forward = pytest.importorskip("fla.ops.kda.chunk_fwd")
    delta_h = pytest.importorskip("fla.ops.common.chunk_delta_h")
    backward = pytest.importorskip("fla.ops.kda.chunk_bwd")
    decode = pytest.importorskip("fla.ops.kda.fused_recurrent")

intra.SOLVE_TRIL_DOT_PRECISION = intra.SAFE_GATE_DOT_PRECISION = triton.language.constexpr("ieee")
if not CUDA:
    intra.IS_GATHER_SUPPORTED = False
    delta_h.range = lambda *args: map(Index, builtins.range(*args))

FIELDS = ("o", "final_state", "g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h", "initial_state")


def chunk_kda_fwd(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, **options):
    """FLA's `chunk_kda_fwd`: its fields by name, numpy or None."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    made = run(forward.chunk_kda_fwd, q, k, v, g, beta, scale, initial_state, output_final_state, **options)
    return dict(zip(FIELDS, made, strict=True))


def run(op, *args, **kwargs):
    """`op` with numpy arrays for tensors, both ways."""
    args = [to_kind(x, "torch") for x in args]
    kwargs = {name: to_kind(x, "torch") for name, x in kwargs.items()}
    with np.errstate(all="ignore"), torch.no_grad():  # lanes that are masked away overflow
        made = op(*args, **kwargs)
    return tuple(map(to_numpy, made)) if isinstance(made, tuple) else to_numpy(made)


BACKWARD_STAGES = (
    "chunk_kda_bwd_dAv",
    "chunk_gated_delta_rule_bwd_dhu",
    "chunk_kda_bwd_wy_dqkg_fused",
    "chunk_kda_bwd_intra",
    "kda_gate_bwd",
)


def chunk_kda_bwd(*args, **kwargs):
    """FLA's `chunk_kda_bwd`, and {stage: (its arguments by name, what it returned)} of the stages it runs."""
    stages = {}

    def recorded(name, stage):
        def run(**arguments):
            given = {
                key: copied(x) for key, x in arguments.items()
            }  # a stage may write over what it is given
            made = stage(**arguments)
            stages[name] = given, tuple(map(copied, made))
            return made

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in BACKWARD_STAGES:
            patch.setattr(backward, name, recorded(name, getattr(backward, name)))
        made = run(backward.chunk_kda_bwd, *args, **kwargs)
    return made, stages


def copied(x):
    return to_numpy(x).copy() if torch.is_tensor(x) else x
