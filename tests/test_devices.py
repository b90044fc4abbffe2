"""Many devices and many processes, in processes of their own: JAX learns their number as it starts."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from inputs import draw
from jax.sharding import AbstractMesh, Mesh

from tops.cpu.kda import chunk_kda, context_parallel_kda

TESTS = Path(__file__).parent


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | environment, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.unoptimized
@pytest.mark.slow
def test_on_eight_devices():
    tests = str(TESTS / "devices" / "on_eight_devices.py")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    print(run("-m", "pytest", "-q", tests, XLA_FLAGS=flags))


@pytest.mark.unoptimized
@pytest.mark.slow
def test_processes_give_the_bits_of_devices():
    """2 and 4 processes against 2 and 4 devices of one process, and all against one device."""
    script = str(TESTS.parent / "examples" / "distributed.py")
    out = run("-W", "error", script, "--tokens", "256", "--heads", "2", "--dim", "16")
    rows = re.findall(r"^ +(\d) +(\d) +256 +([\d.e-]+) +([\d,]+) +(-|the same)$", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "2"), ("2", "2"), ("1", "4"), ("4", "4")], out
    assert [row[4] for row in rows] == ["-", "the same"] * 2
    for _, devices, error, received, _ in rows:
        assert float(error) <= 1e-6
        assert int(received.replace(",", "")) == (int(devices) - 1) * 4 * 2 * 16 * (16 + 16)


@pytest.mark.unoptimized
@pytest.mark.parametrize(
    ("packed", "gradients"), [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_one_device_is_a_mesh_too(packed, gradients):
    """What it computes is `chunk_kda`'s: the fast tier's word for the eight."""
    x = draw(T=70, H=1, HV=2, K=8, V=4, dtype=np.float64)
    options = dict(cu_seqlens=np.array([0, 33, 70]) if packed else None, chunk_size=32)
    mesh = Mesh(np.array(jax.devices()[:1]), ("time",))

    @partial(jax.jit, static_argnums=0)
    def results_and_gradients(op, *x):
        def results(*x):
            return op(*x, **options, output_final_state=True)

        if not gradients:
            return results(*x)
        made, pull = jax.vjp(results, *x)
        return made, pull(made)

    made, expected = (
        jax.tree.leaves(results_and_gradients(op, *x))
        for op in (partial(context_parallel_kda, mesh=mesh, axis_name="time"), chunk_kda)
    )
    for y, z in zip(made, expected, strict=True):
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-12)


MESH = AbstractMesh((2, 3), ("rows", "time"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(mesh=None), TypeError, "mesh: expected a jax.sharding.Mesh, got NoneType"),
        (
            dict(axis_name="x"),
            ValueError,
            "axis_name: expected an axis of the mesh, one of ('rows', 'time'), got 'x'",
        ),
        (
            dict(head_axis_name="x"),
            ValueError,
            "head_axis_name: expected an axis of the mesh, one of ('rows', 'time'), got 'x'",
        ),
        (
            dict(axis_name="rows", batch_axis_name="rows"),
            ValueError,
            "batch_axis_name: expected an axis that nothing else is sharded over, got 'rows'",
        ),
        (
            dict(T=40),
            ValueError,
            "q: expected T a multiple of the 3 devices of mesh axis 'time', got T=40",
        ),
        (
            dict(batch_axis_name="rows"),
            ValueError,
            "q: expected B a multiple of the 2 devices of mesh axis 'rows', got B=1",
        ),
        (
            dict(H=3, HV=6, head_axis_name="rows"),
            ValueError,
            "q: expected H a multiple of the 2 devices of mesh axis 'rows', got H=3",
        ),
        (
            dict(initial_state=np.zeros((2, 4, 8, 8), np.float32)),
            ValueError,
            "initial_state: expected [N, HV, K, V] = (1, 4, 8, 8), got (2, 4, 8, 8)",
        ),
        (
            dict(initial_state=np.zeros((1, 4, 8, 8), np.float32), cu_seqlens=np.array([0, 20, 42])),
            ValueError,
            "initial_state: expected [N, HV, K, V] = (2, 4, 8, 8), got (1, 4, 8, 8)",
        ),
        (dict(chunk_size=48), ValueError, "chunk_size: expected one of (16, 32, 64, 128), got 48"),
    ],
)
def test_refuses(change, error, message):
    sizes = dict(T=42, H=2, HV=4, K=8)
    sizes |= {name: change[name] for name in sizes if name in change}
    options = dict(mesh=MESH, axis_name="time") | {n: x for n, x in change.items() if n not in sizes}
    with pytest.raises(error) as caught:
        context_parallel_kda(*draw(**sizes), **options)
    assert str(caught.value) == message
