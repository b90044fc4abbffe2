"""How `dot` is compiled."""

import re

import jax
import jax.numpy as jnp

from tops.cpu.kda.dot import alone


def test_alone_is_a_call_on_a_cpu_and_nowhere_else():
    """XLA has not inlined it: the mark that asks for that is no documented one, and the speed hangs on it."""
    f = jax.jit(lambda x: 2 * alone(jnp.sin)(x + 1))
    x = jnp.ones((8, 8))
    assert re.search(r' call\(.*inlineable="false"', f.lower(x).compile().as_text())
    for platform in ("cuda", "tpu"):
        assert "inlineable" not in f.trace(x).lower(lowering_platforms=(platform,)).as_text()
