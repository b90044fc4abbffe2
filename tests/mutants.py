"""Faults put into a copy of the package, one by one: the suite must fail for each; `make mutants`.

A fault is (file, text, replacement, what it is). The text must be found exactly once. The fast tier of the suite
looks for it and stops at the first test that fails; `mutants.json` keeps which that was and how many seconds it
took, and the next run starts with it. Exit status 1 if a fault survives.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "mutants.json"
# The quick and sharp ones first; the conformance kit is not about this package's faults.
ORDER = [
    "contract",
    "containment",
    "checks",
    "packing",
    "properties",
    "pullback",
    "backward",
    "gradients",
    "accuracy",
    "determinism",
    "devices",
    "demo",
    "docs",
]
MUTANTS = [
    ("one_chunk/__init__.py", "scale * output(qg_S", "scale * scale * output(qg_S", "scale twice"),
    ("one_chunk/output.py", "qg_S + matmul(Aqk", "qg_S + 2 * matmul(Aqk", "a chunk read twice by its own queries"),
    ("one_chunk/__init__.py", "write(chunk.A, beta, v - k_in_S)", "write(chunk.A, beta, v / jnp.where(beta == 0, 1, beta)[..., None] - k_in_S)", "beta on what is erased, not on v"),
    ("scan.py", "if config.activations.gate:  #", "if False:  #", "an activated gate decays the state past a sequence's end"),
    ("scan.py", "h = jnp.where(length > 0, h, 0)", "h = 1 * h", "h of chunks that no sequence needs"),
    ("scan.py", "cumsum(RCP_LN2 * g, axis=2)", "cumsum(g, axis=2)", "g in nats, not log2"),
    ("chunk_fwd.py", 'made["h"][:, :NT]', 'made["h"]', "h as long as the bound"),
    ("one_chunk/intra.py", "(x * a[..., None, :])", "x", "the first token's decay left out: an exclusive range"),
    ("one_chunk/intra.py", "else [inner(q, k), ", "else [jnp.zeros_like(k[..., 0]), ", "Aqk without its diagonal"),
    ("one_chunk/__init__.py", "store(scale * chunk.Aqk)", "store(chunk.Aqk)", "Aqk without scale"),
    ("one_chunk/intra.py", "self._scores_of(0).matrix()", "self._scores_of(-1).matrix()", "Aqk of k instead of q"),
    ("one_chunk/intra.py", "d_rows_2 = d_below * cols_1", "d_rows_2 = jnp.flip(d_below, -2) * cols_1", "a neighbour's gradient of q for that of k"),
    ("one_chunk/triangle.py", "row = row - L_ij * X_j", "row = row + L_ij * X_j", "the sign of the substitution inside a block"),
    ("one_chunk/triangle.py", "L_i = jnp.where(j < i, L_i, 0)", "L_i = 1 * L_i", "the inverse of a block reads above the diagonal"),
    ("one_chunk/triangle.py", "self._by_blocks(beta, 0)", "self._by_blocks(beta, 1)", "the second half's beta for the first"),
    ("one_chunk/intra.py", "matmul(d_below, cols_1), matmul_tn(d_below, rows_2)", "matmul(d_below, cols_1), jnp.zeros_like(cols_1)", "half of the product rule"),
    ("scan.py", "d_S = chunking.read_state(d_states, n, config.packed)", "d_S, S = chunking.read_state(d_states, n, config.packed), jnp.where(start > 0, S, 0)", "the gradient's first chunk does not start from the initial state"),
    ("one_chunk/wy.py", "inner(d_r, e)", "inner(d_r, beta[..., None] * e) / jnp.where(beta == 0, 1, beta)", "the gradient of beta by a quotient, nothing where beta is 0"),
    ("scan.py", "(h if keep or", "(S if keep or", "a gradient keeps the state that leaves a chunk"),
    ("chunking.py", "jnp.repeat(x, G, axis=2)", "jnp.stack([x] + (G - 1) * [lax.stop_gradient(x)], axis=3).reshape(*x.shape[:2], HV, *x.shape[3:])", "a q/k head's gradient from the first of its value heads alone"),
    ("one_chunk/__init__.py", "in_halves=False), beta[..., None] * e", "in_halves=False), e", "what was written, without beta, in a gradient"),
    ("one_chunk/__init__.py", "d_o, -d_v)", "d_o, d_v)", "the sign of what a gradient gives to what k reads"),
    ("scan.py", "(chunks, kept, d_h), reverse", "(chunks, (kept[0], kept[1][:1].repeat(len(kept[1]), 0)), d_h), reverse", "every chunk's errors are the first's"),
    ("one_chunk/state.py", "matmul_nt(v_new, d_S_out)", "0 * kg", "a gradient that kg gets nothing of from the state"),
    ("one_chunk/triangle.py", "x = join_below(x, below)", "x = join_below(x, 0 * below)", "q does not read the first half of its chunk"),
    ("one_chunk/triangle.py", "d_1 - matmul_tn", "d_1 + matmul_tn", "the sign of the substitution from the last token to the first"),
    ("one_chunk/intra.py", "(matmul_nt(d_reads, S),", "(-matmul_nt(d_reads, S),", "the sign of what a gradient gives to the decayed rows"),
    ("one_chunk/wy.py", "solve_transposed(L, invert_blocks(L), d_v_new)", 'solve_transposed(L, __import__("jax").lax.stop_gradient(invert_blocks(L)), d_v_new)', "an inverse that second derivatives do not see"),
    ("one_chunk/decay.py", "scale_half(rows, 1, total_1)", "scale_half(rows, 1, total_2)", "the wrong half's decay on the rows"),
    ("one_chunk/decay.py", "scale_half(cols, 0, total_2)", "scale_half(cols, 1, total_2)", "the decay on the wrong half of the columns"),
    ("one_chunk/intra.py", "add_to_half(d_cols, 0, d_cols_1)", "add_to_half(d_cols, 1, d_cols_1)", "a gradient that goes back to the wrong half"),
    ("one_chunk/decay.py", "exp(gk), exp(last - gk), exp(last)[..., 0, :]", "exp(gk), exp(gk - last), exp(last)[..., 0, :]", "D(C<-j) upside down in the stage ops"),
    ("one_chunk/decay.py", "prepend=jnp.zeros_like(gk[..., :1, :])", "prepend=gk[..., :1, :]", "the first decay of a chunk is 1 in the intra stage"),
    ("wy_fast.py", "store_beta_k(beta[..., None] * k) * prefix", "store_beta_k(k) * prefix", "w without beta"),
    ("one_chunk/wy.py", "store(beta[..., None] * v))", "store(v))", "u without beta"),
    ("wy_fast.py", "chunks.split(q) * prefix", "chunks.split(q)", "qg without its decay"),
    ("one_chunk/state.py", "store(u - matmul(w", "store(u + matmul(w", "the sign of what the state answers, in stage 3"),
    ("one_chunk/state.py", "decay[..., None] * S + matmul_tn", "S + matmul_tn", "the state does not decay over a chunk"),
    ("one_chunk/state.py", "decay[..., None] * S + matmul_tn", "decay[..., 0, None, None] * S + matmul_tn", "one channel's decay for all"),
    ("chunk_delta_h.py", "k, decay = k * suffix, decay * total", "k, decay = k, decay * total", "the scalar gate's decay missing on k"),
    ("chunk_o.py", "output(scale * qg_S", "output(qg_S", "stage 4 without scale"),
    ("chunk_o.py", "jnp.where(jnp.tril(jnp.ones((C, C), bool)), chunks.split(A), 0)", "chunks.split(A) * jnp.tril(jnp.ones((C, C)))", "the triangle masked by multiplication"),
    ("chunk_o.py", "jnp.where(jnp.tril(jnp.ones((C, C), bool)), chunks.split(A), 0)", "chunks.split(A)", "stage 4 reads above the diagonal"),
    ("chunking.py", "return jnp.where(_over_rows(jnp.arange(rows.shape[1]) < length, rows), rows, 0)", "return rows * _over_rows(jnp.arange(rows.shape[1]) < length, rows).astype(rows.dtype)", "rows masked by multiplication"),
    ("chunking.py", "jnp.arange(rows.shape[1]) < length, rows", "jnp.arange(rows.shape[1]) <= length, rows", "a row of the next sequence in a chunk"),
    ("chunking.py", "inside = _over_rows((index >= 0) & (index < length), x)", "inside = _over_rows(index >= 0, x)", "a chunk's unused rows overwrite what follows"),
    ("chunking.py", "rows = jnp.take(rows, jnp.arange(C) + (start - begin)", "rows = jnp.take(rows, jnp.arange(C) + 0 * (start - begin)", "the last chunk is not moved up"),
    ("chunking.py", "index = jnp.arange(C) - (start - begin)", "index = jnp.arange(C) - 0 * (start - begin)", "what was moved up is not moved back"),
    ("chunking.py", "sliced(states, n)", "sliced(states, 0 * n)", "every sequence starts from the first state"),
    ("scan.py", "chunking.write_state(d_states, d_S if", "chunking.write_state(d_states, chunking.read_state(d_states, n, config.packed) + d_S if", "a gradient to the state that a chunk replaced"),
    ("chunking.py", 'jnp.searchsorted(offsets, index, side="right")', 'jnp.searchsorted(offsets, index, side="left")', "a chunk belongs to the sequence before"),
    ("chunking.py", "counts = -(-prepare_lens(cu_seqlens) // chunk_size)", "counts = prepare_lens(cu_seqlens) // chunk_size + 1", "a chunk too many for whole lengths, one for an empty sequence"),
    ("chunking.py", "return (T + N * (C - 1)) // C", "return (T + C - 1) // C", "the bound forgets that each sequence may end in a short chunk"),
    ("chunking.py", "jnp.repeat(x, G, axis=2)", "jnp.tile(x, (1, 1, G, *[1] * (x.ndim - 3)))", "value head h reads q/k head h % H"),
    ("chunking.py", "return turn(initial_state, state_v_first).astype(dtype)", "return initial_state.astype(dtype).reshape(N, HV, K, V)", "state_v_first reinterprets the initial state"),
    ("chunking.py", "rows = jnp.where(inside.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)", "rows = rows * inside.reshape(-1, *[1] * (rows.ndim - 1))", "the stage ops' padding masked by multiplication"),
    ("chunking.py", "np.minimum(T - start, C)", "np.full_like(start, C)", "the last chunk of a dense batch reads past its end"),
    ("chunking.py", "row = jnp.minimum(jnp.arange(self.C), self.table.length[:, None] - 1)", "row = jnp.minimum(jnp.arange(self.C)[None], self.C - 1) + 0 * self.table.length[:, None]", "a short chunk's cumulative sum falls back to 0"),
    ("chunking.py", "*hidden(x, begin)", "*(x, begin)", "16-bit inputs are widened whole (before JAX 0.11)"),
    ("activations.py", "return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)", "return x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + L2NORM_EPS)", "the epsilon outside the root"),
    ("activations.py", "-jnp.exp(A_log)[:, None] * jax.nn.softplus(g)", "-jnp.exp(A_log) [:, None] * jax.nn.relu(g)", "relu for softplus"),
    ("activations.py", "jnp.exp(A_log)[:, None] * g)", "g * A_log[:, None])", "A_log for its exponential"),
    ("activations.py", "beta = activations.beta_scale * jax.nn.sigmoid(beta)", "beta = jax.nn.sigmoid(beta)", "allow_neg_eigval does nothing"),
    ("activations.py", "return lax.fori_loop(1, n, add, g)", "return lax.cumsum(g, axis, reverse)", "the sums are made by doubling"),
    ("activations.py", "(n - 1 - i, n - i) if reverse else (i, i - 1)", "i, i - 1", "reverse is forgotten"),
    ("activations.py", "return float(lower_bound) * jax.nn", "return lower_bound * jax.nn", "a NumPy scalar widens the gate"),
    ("fused_recurrent.py", "S = jnp.exp(g)[..., None] * S\n    error", "error", "decoding without decay"),
    ("fused_recurrent.py", 'S, scale * dot("...k,...kv->...v", q, S)', 'S, dot("...k,...kv->...v", q, S)', "decoding without scale"),
    ("fused_recurrent.py", "lax.cond(n < N, compute, pad, S, *x)", "compute(S, *x)", "padding reaches the last sequence's state"),
    ("naive.py", 'return states.at[n].set(S, mode="drop"), jnp.where(n < N, o, 0)', 'return states.at[n].set(S, mode="drop"), o', "the oracle's padding is not zero"),
    ("checks.py", "np.flatnonzero(np.diff(x) < 0)", "np.flatnonzero(np.diff(x) < -9)", "a small decrease passes"),
    ("checks.py", 'INTEGERS = ("int32", "int64")', 'INTEGERS = ("int32", "int64", "uint32")', "unsigned cu_seqlens"),
    ("checks.py", "last <= T", "last <= T + 1", "cu_seqlens past T"),
    ("scan.py", "d_S if d_h is None else d_S + d_h", "d_S", "the gradient of h is ignored"),
    ("scan.py", "config.storage_dtype is None and set", "set", "states that are not rounded, of a gradient that is"),
    ("rounding.py", "x.astype(dtype).astype(x.dtype)", "x", "an intermediate is not rounded to storage_dtype"),
    ("scan.py", "enumerate(wanted[1]) if is_wanted]", "enumerate(wanted[1])]", "gradients that nobody wants are made"),
    ("scan.py", "jax.tree.map(jnp.add, d_parameters, d_here)", "d_here", "A_log's gradient of the first chunk alone"),
    ("one_chunk/decay.py", "halves(rows, n)[1] * halves(d_rows, n)[1]", "halves(rows, n)[0] * halves(d_rows, n)[1]", "the gradient of a block's decay from the wrong rows"),
    ("one_chunk/decay.py", "+ d_total * total_2", "+ d_total * total_1", "the gradient of a block's decay from itself"),
    ("one_chunk/state.py", "inner(S, d_S_out)", "inner(S, S)", "the gradient of a chunk's decay without the cotangent"),
    ("one_chunk/__init__.py", "d_o = scale * d_o", "d_o = 1.0 * d_o", "a gradient without scale"),
    ("one_chunk/__init__.py", "d_v_new = output_backward(chunk.Aqk, d_o)", "d_v_new = 0.0", "a gradient in which no chunk reads itself"),
    ("chunk_bwd.py", "kda_gate_bwd(chunking.keep_tokens(g_org, cu_seqlens)", "kda_gate_bwd(g_org", "a raw gate of NaN in the padding reaches A_log's gradient"),
    ("one_chunk/output.py", "return jnp.tril(matmul_nt(d_o, v_new))", "return matmul_nt(d_o, v_new)", "dAqk of what no query reads"),
    ("chunk_bwd.py", "d_Aqk = scale * d_scores", "d_Aqk = d_scores", "dAqk without scale"),
    ("chunk_bwd.py", "chunks.split(d_o), jnp.tril(chunks.split(A))", "chunks.split(d_o), chunks.split(A)", "dv of what lies above Aqk's diagonal"),
    ("chunk_bwd.py", "-matmul_nt(store(d_u), S)", "matmul_nt(store(d_u), S)", "the sign of dw"),
    ("chunk_bwd.py", "d_g = chunks.keep(d_g)", "d_g = 1 * d_g", "dg of tokens past a chunk's end"),
    ("chunk_bwd.py", "d_kg * D_out + d_k_in * D_in", "d_kg * D_out", "dk without what comes through w"),
    ("chunk_bwd.py", "chunking.sum_groups(x, q.shape[2]) for", "x.reshape(*x.shape[:2], q.shape[2], -1, x.shape[-1]).mean(3) for", "dq and dk averaged over the value heads"),
    ("chunk_delta_h.py", "return chunking.write_state(d_states, d_S, n, packed), (d_S_out, dv)", "return chunking.write_state(d_states, d_S, n, packed), (d_S, dv)", "dh a chunk late"),
    ("chunk_delta_h.py", "chunking.first_states(dht, N, HV, w", "chunking.first_states(None, N, HV, w", "dht ignored by the stage"),
    ("chunk_delta_h.py", "dv = store(dv + matmul(k, store(d_S_out)))", "dv = dv + matmul(k, store(d_S_out))", "dv of the state not rounded as it is stored"),
    ("one_chunk/state.py", "return -matmul_tn(w, d_v_new)", "return matmul_tn(w, d_v_new)", "the sign of what w gives to the state"),
    ("one_chunk/wy.py", "inner(d_beta_k_in, k_in) + inner(d_beta_v, v)", "inner(d_beta_v, v)", "db without what comes through w"),
    ("one_chunk/wy.py", "* beta[..., None, :]\n", "* beta[..., :, None]\n", "the row's beta for the column's in dAkk"),
    ("one_chunk/intra.py", "_by_turns(d_Aqk, beta * d_L)", "_by_turns(d_Aqk, d_L)", "dAkk without beta in stage 1"),
    ("one_chunk/intra.py", "d_beta = inner(jnp.tril(d_L, -1), chunk.A.matrix())", "d_beta = jnp.zeros_like(beta[..., 0])", "db without what comes through the scores"),
    ("one_chunk/decay.py", "lax.cumsum(earlier, axis)", "lax.cumsum(d_out, axis)", "dg of a token's own decay to the end: an inclusive range"),
    ("one_chunk/decay.py", "append=jnp.zeros_like(d_g[..., :1, :])", "append=d_g[..., -1:, :]", "the last sum's cotangent left out"),
    ("activations.py", "jnp.clip(g, -1e30, 1e30)", "1 * g", "the gradient of an infinite gate is NaN"),
    ("rounding.py", "storage(dtype if beta_dtype == dtype else None)", "storage(None)", "beta k not rounded to 16 bits before the decay"),
    ("fused_recurrent.py", "slot = jnp.where(slot < 0, len(pool), slot)", "slot = 1 * slot", "a sequence without a slot writes the last one"),
    ("fused_recurrent.py", "jnp.zeros(len(slots), int) if accepted is None else accepted - 1", "jnp.zeros(len(slots), int)", "the accepted tokens are forgotten"),
    ("fused_recurrent.py", "h = (jnp.where(n < N, S, 0) if packed else S) if keep_states", "h = S if keep_states", "the state after a token of the padding"),
    ("naive.py", "beta * k * D_in", "beta * k", "w of the naive chunk form without its decay"),
    ("naive.py", "k * D[..., -1, :, :]", "k", "kg of the naive chunk form without its decay"),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python tests/mutants.py", description=__doc__)
    parser.add_argument("--only", help="the faults whose file or description contains this")
    parser.add_argument(
        "--tier", choices=["fast", "all"], default="fast", help="the tests that look for them"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="faults at a time (default: one a core)"
    )
    args = parser.parse_args()
    for file, old, _, what in MUTANTS:
        found = (ROOT / "src/tops/cpu/kda" / file).read_text().count(old)
        if found != 1:
            print(f"{file}: expected the text of '{what}' once, found it {found} times: {old!r}")
            return 2
    chosen = [m for m in MUTANTS if not args.only or args.only in f"{m[0]} {m[3]}"]
    record = json.loads(RECORD.read_text())
    survivors = []
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(args.jobs) as pool:

        def timed(mutant):
            start = time.perf_counter()
            return (
                mutant,
                *judge(mutant, args.tier, record.get(mutant[3]), cache),
                time.perf_counter() - start,
            )

        for i, done in enumerate(as_completed([pool.submit(timed, mutant) for mutant in chosen])):
            (file, _, _, what), test, took, seconds = done.result()
            verdict = test or "SURVIVES"
            print(f"{i + 1:3} of {len(chosen)}  {file:20} {what:70} {verdict} ({seconds:.0f} s)", flush=True)
            if test is None:
                survivors.append(what)
            else:
                record[what] = dict(test=test, seconds=round(took, 1))
    record = {what: record[what] for *_, what in MUTANTS if what in record and what not in survivors}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults found")
    return 1 if survivors else 0


def judge(mutant, tier, known, cache):
    """The first test of the tier that fails with the fault, and its seconds; None, None if it survives."""
    file, old, new, what = mutant
    with tempfile.TemporaryDirectory() as folder:
        for name in ("src", "tests", "docs", "examples", "README.md", "pyproject.toml"):
            source, target = ROOT / name, Path(folder, name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        path = Path(folder, "src/tops/cpu/kda", file)
        path.write_text(path.read_text().replace(old, new))
        if known:
            test, seconds = first_failure(folder, [known["test"]], tier, cache, what)
            if test:
                return test, seconds
        order = sorted(ORDER, key=lambda name: f"{name}.py" != file)  # a module's own tests first
        return first_failure(folder, [f"tests/test_{name}.py" for name in order], tier, cache, what)


def first_failure(folder, tests, tier, cache, what):
    """Of those tests, the first that fails and its seconds; None, None if none does."""
    report = Path(folder, "report.xml")
    chosen = " and not slow" if tier == "fast" else " and not long"
    for passes in (["-m", "unoptimized" + chosen, "--unoptimized"], ["-m", "not unoptimized" + chosen]):
        run = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-qx",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                *passes,
                *tests,
            ],
            cwd=folder,
            env=os.environ | dict(PYTHONPATH=str(Path(folder, "src")), JAX_COMPILATION_CACHE_DIR=cache),
            capture_output=True,
            text=True,
        )
        # 4 and 5: a test of the record is not there any more, or not in this pass.
        if run.returncode not in (0, 4, 5):
            break
    else:
        return None, None
    failed = [line.split(" - ")[0] for line in run.stdout.splitlines() if line.startswith("FAILED")]
    if not failed:  # no verdict: the tests could not be run
        raise SystemExit(f"{what}: pytest ended with {run.returncode}\n{run.stdout}{run.stderr}")
    cases = ElementTree.parse(report).iter("testcase")
    seconds = next(float(case.get("time")) for case in cases if len(case) and case[0].tag == "failure")
    return failed[0].removeprefix("FAILED "), seconds


if __name__ == "__main__":
    sys.exit(main())
