"""Faults put into a copy of the package, one by one: the suite must fail for each; `make mutants`.

A fault is (file, text, replacement, what it is). The text must be found exactly once. The tests run in an order
that puts the quick and sharp ones first, and stop at the first failure. Exit status 1 if a fault survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [
    "contract",
    "containment",
    "checks",
    "packing",
    "properties",
    "as_read",
    "pullback",
    "gradients",
    "accuracy",
    "determinism",
    "devices",
    "demo",
    "docs",
]
MUTANTS = [
    ("chunk_fwd.py", "o = scale * read", "o = scale * scale * read", "scale twice"),
    ("chunk_fwd.py", "pick(seen, -2, 0) + read", "pick(seen, -2, 0) + 2 * read", "a chunk read twice by its own queries"),
    ("chunk_fwd.py", "r = spread(beta[..., None], -1, v.shape[-1]) * (v - pick(seen, -2, R - 1))", "r = v - spread(beta[..., None], -1, v.shape[-1]) * pick(seen, -2, R - 1)", "beta on what is erased, not on v"),
    ("chunk_fwd.py", "if activations.gate:  #", "if False:  #", "an activated gate decays the state past a sequence's end"),
    ("chunk_fwd.py", "jnp.where(length > 0, h, 0)", "h", "h of chunks that no sequence needs"),
    ("chunk_fwd.py", "cumsum(RCP_LN2 * rows[3], axis=1)", "cumsum(rows[3], axis=1)", "g in nats, not log2"),
    ("chunk_fwd.py", 'made["h"][:, :NT]', 'made["h"]', "h as long as the bound"),
    ("chunk_intra.py", "rows = x * spread(a[..., None, :], -2, x.shape[-2])", "rows = x", "the first token's decay left out: an exclusive range"),
    ("chunk_intra.py", "diagonal = [inner(q, k), *diagonal]", "diagonal = [jnp.zeros_like(beta), *diagonal]", "Aqk without its diagonal"),
    ("chunk_intra.py", "Aqk = scale * whole(", "Aqk = whole(", "Aqk without scale"),
    ("chunk_intra.py", "chunk.below)[..., 0::2, :]", "chunk.below)[..., 1::2, :]", "Aqk of k instead of q"),
    ("chunk_intra.py", "jnp.split(x, x.shape[-2], axis=-2)", "jnp.split(jnp.flip(x, -2), x.shape[-2], axis=-2)", "a neighbour's gradient of q for that of k"),
    ("solve.py", "row = row - L_ij * X_j", "row = row + L_ij * X_j", "the sign of the substitution inside a block"),
    ("solve.py", "L_i = jnp.where(j < i, L_i, 0)", "L_i = 1 * L_i", "the inverse of a block reads above the diagonal"),
    ("solve.py", "r_2 - beta_2 * pick(seen, -2, R - 1)", "r_2 - beta_1 * pick(seen, -2, R - 1)", "the first half's beta for the second"),
    ("dot.py", "_product(subscripts, dx, y) + dy", "_product(subscripts, dx, y)", "half of the product rule"),
    ("chunk_bwd.py", "jnp.where(start > 0, S, S_0)", "S", "the gradient's first chunk does not start from the initial state"),
    ("chunk_bwd.py", "jnp.where(_small(beta)[..., None], e, v_new)", "v_new", "nothing to make the gradient of a beta of 0 from"),
    ("chunk_bwd.py", "V <= K <= 2 * C", "V <= K", "a state that does not fit into the gradients of q and k"),
    ("chunk_bwd.py", "H == HV and ", "", "value heads that do not fit into the gradients of q and k"),
    ("chunk_bwd.py", "jnp.finfo(beta.dtype).eps", "10", "v_new made of what was kept, not kept"),
    ("chunk_bwd.py", "[d_o, -d_v]", "[d_o, d_v]", "the sign of what a gradient gives to what k reads"),
    ("chunk_bwd.py", "_lay(x, merge_heads(rows), start)", "_lay(x, merge_heads(rows), 0 * start)", "every chunk keeps its state in the first's place"),
    ("chunk_delta_h.py", "update(merge_channels(dkg), v_new) + ", "", "a gradient that kg gets nothing of from the state"),
    ("solve.py", "z_2 + pick(seen, -2, 0)", "z_2", "q does not read the first half of its chunk"),
    ("solve.py", "return X, -dot(", "return X, dot(", "the sign of the inverse's derivative"),
    ("solve.py", "(dr - dot(", "(dr + dot(", "the sign of the substitution's derivative"),
    ("chunk_intra.py", "L, invert(L), rows", "L, invert(lax.stop_gradient(L)), rows", "an inverse that second derivatives do not see"),
    ("decay.py", "rows = _scale_half(rows, 1, first)", "rows = _scale_half(rows, 1, second)", "the wrong half's decay on the rows"),
    ("decay.py", "cols = _scale_half(cols, 0, second)", "cols = _scale_half(cols, 1, second)", "the decay on the wrong half of the columns"),
    ("dot.py", "jnp.where(entry == i, dx, 0)", "jnp.where(entry == 0, dx, 0)", "a gradient that goes back to the wrong half"),
    ("decay.py", "exp(gk), exp(last - gk), exp(last)[..., 0, :]", "exp(gk), exp(gk - last), exp(last)[..., 0, :]", "D(C<-j) upside down in the stage ops"),
    ("decay.py", "prepend=jnp.zeros_like(gk[..., :1, :])", "prepend=gk[..., :1, :]", "the first decay of a chunk is 1 in the intra stage"),
    ("wy_fast.py", "store(beta * k_in))", "store(k_in))", "w without beta"),
    ("wy_fast.py", "store(beta * v))", "store(v))", "u without beta"),
    ("wy_fast.py", "chunks.split(q) * prefix", "chunks.split(q)", "qg without its decay"),
    ("chunk_delta_h.py", 'store(u - dot("...ik', 'store(u + dot("...ik', "the sign of what the state answers, in stage 3"),
    ("chunk_delta_h.py", "spread(decay[..., None], -1, S.shape[-1]) * S + _update", "S + _update", "the state does not decay over a chunk"),
    ("chunk_delta_h.py", "spread(decay[..., None], -1, S.shape[-1]) * S + _update", "decay[..., 0, None, None] * S + _update", "one channel's decay for all"),
    ("chunk_delta_h.py", "k, decay = k * suffix, decay * total", "k, decay = k, decay * total", "the scalar gate's decay missing on k"),
    ("chunk_o.py", "scale * inter + dot", "inter + dot", "stage 4 without scale"),
    ("chunk_o.py", "jnp.where(jnp.tril(jnp.ones((C, C), bool)), chunks.split(A), 0)", "chunks.split(A) * jnp.tril(jnp.ones((C, C)))", "the triangle masked by multiplication"),
    ("chunk_o.py", "jnp.where(jnp.tril(jnp.ones((C, C), bool)), chunks.split(A), 0)", "chunks.split(A)", "stage 4 reads above the diagonal"),
    ("chunking.py", "return jnp.where(_over_rows(jnp.arange(rows.shape[1]) < length, rows), rows, 0)", "return rows * _over_rows(jnp.arange(rows.shape[1]) < length, rows).astype(rows.dtype)", "rows masked by multiplication"),
    ("chunking.py", "jnp.arange(rows.shape[1]) < length, rows", "jnp.arange(rows.shape[1]) <= length, rows", "a row of the next sequence in a chunk"),
    ("chunking.py", "inside = _over_rows((index >= 0) & (index < length), x)", "inside = _over_rows(index >= 0, x)", "a chunk's unused rows overwrite what follows"),
    ("chunking.py", "keep_rows(_move_up(rows, start - begin), length)", "keep_rows(rows, length)", "the last chunk is not moved up"),
    ("chunking.py", "lax.dynamic_slice_in_dim(drows, by, rows", "lax.dynamic_slice_in_dim(drows, 0, rows", "the gradient of what is moved up is not moved back"),
    ("chunking.py", "once(lax.dynamic_slice_in_dim(states, n, 1))", "once(lax.dynamic_slice_in_dim(states, 0, 1))", "every sequence starts from the first state"),
    ("chunking.py", "(_write(d_states, jnp.zeros_like(S), n), d_S)", "(d_states, d_S)", "a gradient to the state that a chunk replaced"),
    ("chunking.py", 'jnp.searchsorted(offsets, index, side="right")', 'jnp.searchsorted(offsets, index, side="left")', "a chunk belongs to the sequence before"),
    ("chunking.py", "counts = -(-prepare_lens(cu_seqlens) // chunk_size)", "counts = prepare_lens(cu_seqlens) // chunk_size + 1", "a chunk too many for whole lengths, one for an empty sequence"),
    ("chunking.py", "return (T + N * (C - 1)) // C", "return (T + C - 1) // C", "the bound forgets that each sequence may end in a short chunk"),
    ("chunking.py", "jnp.repeat(x, G, axis=2)", "jnp.tile(x, (1, 1, G, *[1] * (x.ndim - 3)))", "value head h reads q/k head h % H"),
    ("chunking.py", "return turn(initial_state, state_v_first).astype(dtype)", "return initial_state.astype(dtype).reshape(N, HV, K, V)", "state_v_first reinterprets the initial state"),
    ("chunking.py", "rows = jnp.where(inside.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)", "rows = rows * inside.reshape(-1, *[1] * (rows.ndim - 1))", "the stage ops' padding masked by multiplication"),
    ("chunking.py", "np.minimum(T - start, C)", "np.full_like(start, C)", "the last chunk of a dense batch reads past its end"),
    ("chunking.py", "row = jnp.minimum(jnp.arange(self.C), self.table.length[:, None] - 1)", "row = jnp.minimum(jnp.arange(self.C)[None], self.C - 1) + 0 * self.table.length[:, None]", "a short chunk's cumulative sum falls back to 0"),
    ("chunking.py", "    x, start = lax.optimization_barrier((x, start))\n", "", "16-bit inputs are widened whole (before JAX 0.11)"),
    ("gate.py", "return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)", "return x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + L2NORM_EPS)", "the epsilon outside the root"),
    ("gate.py", "-jnp.exp(A_log)[:, None] * jax.nn.softplus(g)", "-jnp.exp(A_log) [:, None] * jax.nn.relu(g)", "relu for softplus"),
    ("gate.py", "jnp.exp(A_log)[:, None] * g)", "g * A_log[:, None])", "A_log for its exponential"),
    ("gate.py", "beta = activations.beta_scale * jax.nn.sigmoid(beta)", "beta = jax.nn.sigmoid(beta)", "allow_neg_eigval does nothing"),
    ("gate.py", "return lax.fori_loop(1, n, add, g)", "return lax.cumsum(g, axis, reverse)", "the sums are made by doubling"),
    ("gate.py", "(n - 1 - i, n - i) if reverse else (i, i - 1)", "i, i - 1", "reverse is forgotten"),
    ("gate.py", "return float(lower_bound) * jax.nn", "return lower_bound * jax.nn", "a NumPy scalar widens the gate"),
    ("fused_recurrent.py", "S = jnp.exp(g)[..., None] * S\n    error", "error", "decoding without decay"),
    ("fused_recurrent.py", 'S, scale * dot("...k,...kv->...v", q, S)', 'S, dot("...k,...kv->...v", q, S)', "decoding without scale"),
    ("fused_recurrent.py", "lax.cond(n < N, compute, pad, S, *x)", "compute(S, *x)", "padding reaches the last sequence's state"),
    ("naive.py", 'return states.at[n].set(S, mode="drop"), jnp.where(n < N, o, 0)', 'return states.at[n].set(S, mode="drop"), o', "the oracle's padding is not zero"),
    ("checks.py", "np.flatnonzero(np.diff(x) < 0)", "np.flatnonzero(np.diff(x) < -9)", "a small decrease passes"),
    ("checks.py", 'INTEGERS = ("int32", "int64")', 'INTEGERS = ("int32", "int64", "uint32")', "unsigned cu_seqlens"),
    ("checks.py", "last <= T", "last <= T + 1", "cu_seqlens past T"),
    ("chunk_fwd.py", "if storage_dtype is None:\n        return _one_chunk_as_read", "if False:\n        return _one_chunk_as_read", "q in the pass that makes a gradient's states"),
    ("chunk_fwd.py", "return one_chunk(*primals, scale, storage_dtype, fields), made", "return _one_chunk_as_read(*primals, scale=scale, fields=fields), made", "states that are not rounded, of a gradient that is"),
    ("dot.py", "x.astype(dtype).astype(x.dtype)", "x", "an intermediate is not rounded to storage_dtype"),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python tests/mutants.py", description=__doc__)
    parser.add_argument("--only", help="the faults whose file or description contains this")
    args = parser.parse_args()
    for file, old, _, what in MUTANTS:
        found = (ROOT / "src/tops/cpu/kda" / file).read_text().count(old)
        if found != 1:
            print(f"{file}: expected the text of '{what}' once, found it {found} times: {old!r}")
            return 2
    chosen = [m for m in MUTANTS if not args.only or args.only in f"{m[0]} {m[3]}"]
    survivors = []
    with tempfile.TemporaryDirectory() as cache:  # what a fault does not touch is compiled once
        for i, mutant in enumerate(chosen):
            start = time.perf_counter()
            verdict = judge(mutant, cache)
            file, _, _, what = mutant
            seconds = time.perf_counter() - start
            print(f"{i + 1:3} of {len(chosen)}  {file:20} {what:70} {verdict} ({seconds:.0f} s)", flush=True)
            if verdict == "SURVIVES":
                survivors.append(what)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults found")
    return 1 if survivors else 0


def judge(mutant, cache):
    """The first test that fails with the fault, or SURVIVES."""
    file, old, new, what = mutant
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "docs", "examples", "README.md", "pyproject.toml"):
            source, target = ROOT / name, Path(folder, name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        path = Path(folder, "src/tops/cpu/kda", file)
        path.write_text(path.read_text().replace(old, new))
        order = sorted(ORDER, key=lambda name: f"{name}.py" != file)  # a module's own tests first
        tests = [f"tests/test_{name}.py" for name in order]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=folder,
            env=os.environ | dict(PYTHONPATH=str(Path(folder, "src")), JAX_COMPILATION_CACHE_DIR=cache),
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return "SURVIVES"
    failed = [line.split(" - ")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")]
    if not failed:  # no verdict: the tests could not be run
        sys.exit(f"{what}: pytest ended with {run.returncode}\n{run.stdout}{run.stderr}")
    return failed[0]


if __name__ == "__main__":
    sys.exit(main())
