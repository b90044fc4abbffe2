"""The same call gives the same bits: again, in another process, and with one thread or more."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inputs import draw

from tops.cpu.kda import chunk_kda_fwd, fused_recurrent_kda

# Large enough for XLA to share the work among its threads: packed with GVA, and dense.
CASES = [
    (chunk_kda_fwd, dict(B=1, T=300, H=4, HV=8, K=128)),
    (fused_recurrent_kda, dict(B=2, T=130, H=4, K=64)),
]


def bits():
    """A digest of all that the ops return, one a call."""
    digests = []
    for op, case in CASES:
        options = (
            dict(disable_recompute=True, cu_seqlens=np.array([0, 100, 101, 300])) if case["B"] == 1 else {}
        )
        digest = hashlib.sha256()
        for x in op(*draw(**case), output_final_state=True, **options):
            if x is not None:
                digest.update(np.asarray(x).tobytes())
        digests.append(digest.hexdigest())
    return digests


def in_a_process(threads):
    """`bits` and the number of XLA's threads, with that many asked for: PJRT reads NPROC before the cores."""
    run = subprocess.run(
        [sys.executable, "-c", "import conftest, test_determinism as t; print(*t.bits(), t.xla_threads())"],
        env=os.environ
        | dict(NPROC=str(threads), PYTHONPATH=os.pathsep.join(sys.path), JAX_ENABLE_COMPILATION_CACHE="0"),
        capture_output=True,
        text=True,
        check=True,
    )
    *digests, number = run.stdout.split()
    return digests, int(number)


def xla_threads():
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("tf_XLAEigen") for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_again_and_in_other_processes_with_one_thread_and_more(compiled_anew):
    expected = bits()
    assert bits() == expected
    for threads in (1, 2):
        digests, number = in_a_process(threads)
        assert number == threads
        assert digests == expected
