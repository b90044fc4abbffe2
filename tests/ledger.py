"""The bits of some thirty calls, a digest a line: what a change of the source leaves, and what it moves.

    PYTHONPATH=OLD/src python tests/ledger.py > before
    python tests/ledger.py > after; diff before after

Bits hang on the machine and on the version of JAX: compare two trees in one sitting.
"""

import hashlib

import conftest  # noqa: F401  the suite's platform and precision: no pytest loads it for a script
import jax
import jax.numpy as jnp
import numpy as np
from inputs import draw

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, fused_recurrent_kda, naive_recurrent_kda

ENDS = np.array([0, 70, 70, 71, 140])
LAYOUTS = {
    "dense": (dict(B=2, T=150, H=2, K=16, V=12), {}),
    "whole": (dict(B=1, T=128, H=2, K=24, V=20), {}),
    "packed": (dict(B=1, T=150, H=1, HV=2, K=16, V=12), dict(cu_seqlens=ENDS)),
}
RAW = dict(use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)


def calls():
    """(name, thunk) of each call."""
    for layout, (sizes, options) in LAYOUTS.items():
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            x = draw(dtype=jnp.dtype(dtype), **sizes)
            options = options | dict(output_final_state=True)
            yield f"chunk_kda {layout} {dtype}", lambda x=x, options=options: chunk_kda(*x, **options)
            if dtype == "float32":
                raw = RAW | dict(A_log=np.zeros(x[2].shape[2], np.float32)) | options
                stored = options | dict(storage_dtype="bfloat16")
                all_fields = options | dict(disable_recompute=True)
                yield f"raw {layout}", lambda x=x, raw=raw: chunk_kda(*x, **raw)
                yield f"storage_dtype {layout}", lambda x=x, stored=stored: chunk_kda(*x, **stored)
                yield f"fields {layout}", lambda x=x, o=all_fields: chunk_kda_fwd(*x, **o)
                yield f"fused {layout}", lambda x=x, o=options: fused_recurrent_kda(*x, **o)
                yield f"naive {layout}", lambda x=x, o=options: naive_recurrent_kda(*x, **o)
                yield f"gradient {layout}", lambda x=x, o=options: gradient(x, o)


def gradient(x, options):
    results, pull = jax.vjp(lambda *x: chunk_kda(*x, **options), *x)
    return pull(jax.tree.map(jnp.ones_like, results))


def main():
    for name, call in calls():
        digest = hashlib.sha256()
        for y in jax.tree.leaves(jax.jit(call)()):
            digest.update(np.asarray(y).tobytes())
        print(f"{name:28} {digest.hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
