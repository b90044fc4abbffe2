"""KDA of other libraries, each with the adapter that calls it: what `make peers` judges.

A function returns the kernel, and `check`'s arguments for it.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np

from tops.cpu.kda.testing import adapters as a


def tokamax(implementation):  # 0.0.17
    from tokamax._src.ops.kda.api import kimi_delta_attention

    names = dict(q="query", k="key", v="value", g="gate", A_log="a_log", dt_bias="delta_time_bias")
    names |= dict(use_qk_l2norm_in_kernel="use_qk_l2norm", safe_gate=None, chunk_size=None)
    layout = a.segments(first=1, count="max_num_segments"), a.states("BNHKV"), a.tokens("HBTK")
    adapter = a.compose(a.activated("beta"), a.ungrouped, *layout, a.renamed(**names))
    return partial(kimi_delta_attention, implementation=implementation), dict(adapter=adapter)


def jax_linear_attention():  # 0.1.0
    from jla.ops.chunked import kda

    return kda, dict(adapter="plain,ungrouped,segment_ids")


def mlx_lm():  # 0.32.2
    import mlx.core as mx
    from mlx_lm.models.gated_delta import gated_delta_ops

    names = dict(initial_state="state", output_final_state=None)
    adapter = a.compose(a.of("plain,unpacked,unscaled,decays,states=NHVK"), a.renamed(**names))

    def kernel(**inputs):
        return gated_delta_ops(**{name: mx.array(x) for name, x in inputs.items()})

    return kernel, dict(adapter=adapter, arrays="numpy")


def tokamax_chunked():  # takes whole chunks where it is not packed
    kernel, options = tokamax("xla_chunked")

    def adapter(fn):
        packed = options["adapter"](fn)
        dense = a.padded(64)(packed)
        return lambda **inputs: (packed if "cu_seqlens" in inputs else dense)(**inputs)

    return kernel, dict(adapter=adapter)


def fla_core():  # 0.6.0, in Triton's interpreter where there is no GPU
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fla"))
    import kernels

    def kernel(**inputs):
        with np.errstate(all="ignore"):  # lanes that are masked away overflow
            return kernels.kda.chunk_kda(**inputs)

    return kernel, dict(arrays="torch")
