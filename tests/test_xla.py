"""What the tricks of `one_chunk.xla` ask of the compiler, and what becomes of it."""

import re

import jax
import jax.numpy as jnp
from inputs import draw

from tops.cpu.kda import chunk_kda
from tops.cpu.kda.one_chunk.xla import uninlined


def test_uninlined_is_a_call_on_a_cpu_and_nowhere_else(compiled_anew):
    """XLA has not inlined it: the mark that asks for that is no documented one, and the speed hangs on it."""
    f = jax.jit(lambda x: 2 * uninlined(jnp.sin)(x + 1))
    x = jnp.ones((8, 8))
    assert re.search(r' call\(.*inlineable="false"', f.lower(x).compile().as_text())
    for platform in ("cuda", "tpu"):
        assert "inlineable" not in f.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_bfloat16_inputs_are_widened_a_chunk_at_a_time(compiled_anew):
    """Temporaries do not grow with T, whatever is activated in the scan; o alone is kept wide by old JAX."""

    def temporaries(T):
        q, k, v, g, beta = (jnp.asarray(x, jnp.bfloat16) for x in draw(T=T, H=2, K=32))
        A_log = jnp.zeros(2, jnp.bfloat16)

        def op(*x):
            flags = dict(use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
            return chunk_kda(*x, A_log=A_log, use_gate_in_kernel=True, **flags)

        compiled = jax.jit(op).lower(q, k, v, g, beta).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    o_wide = 0 if jax.__version_info__ >= (0, 11) else 3 * 4096 * 2 * 32 * 4
    assert temporaries(4 * 4096) - temporaries(4096) <= o_wide + 2**14
