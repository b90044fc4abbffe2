"""The benchmark, `make bench`: one process a library, interleaved rounds, medians, ratios within one run.

Prints a table of ratios beside their floors, and writes results.json and kda.svg beside this file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
ROUNDS = 15  # the same call has a fast and a slow time on some machines, for seconds on end
SLOW_ROUNDS = 5  # of a call that takes longer than three seconds
LAYER = dict(T=8192, H=32)  # K = V = 128 throughout
SMALL = dict(T=2048, H=8)
OVER_T = (512, 1024, 2048, 4096, 8192)


class Worker:
    def __init__(self, library, python):
        command = [python, str(HERE / "worker.py"), library]
        pipe = subprocess.PIPE
        self.library = library
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self.reply()["version"]

    def ask(self, **message):
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.reply()

    def reply(self):
        for line in self.process.stdout:
            if line.startswith("reply "):
                return json.loads(line.removeprefix("reply "))
        raise RuntimeError(f"the worker for {self.library} ended")


def start(library, python):
    try:
        return Worker(library, python)
    except (RuntimeError, OSError):
        print(f"left out: {library} is not installed for {python}")


def measure(title, cases):
    """{name: {seconds, rounds, compile, temporaries}} of {name: (worker, case)}, in interleaved rounds."""
    print(f"{title} ...", flush=True)
    cases = {name: (worker, case) for name, (worker, case) in cases.items() if worker}
    results = {name: worker.ask(prepare=name, **case) for name, (worker, case) in cases.items()}
    for result in results.values():
        result["rounds"] = []
    for i in range(ROUNDS):
        for name, (worker, _) in cases.items():
            seconds = results[name]["rounds"]
            if i < SLOW_ROUNDS or median(seconds) < 3:
                seconds.append(worker.ask(time=name)["seconds"])
    for name, (worker, _) in cases.items():
        worker.ask(drop=name)
        results[name]["seconds"] = median(results[name]["rounds"])
        print(f"    {name:24s} {results[name]['seconds']:8.3f} s", flush=True)
    return results


def multiply_adds(T, H, K=128, V=128, C=64):
    """Of the four stages as the formulas have them, the causal halves counted once."""
    triangles = C * C * K  # Aqk and L, half a product each
    wy = C * C // 2 * (K + V)
    state = 2 * C * K * V  # w S, kg^T v_new
    output = C * K * V + C * C // 2 * V
    return T // C * H * (triangles + wy + state + output)


def run(workers):
    ours, jla, fla, other = (workers.get(name) for name in ("ours", "jla", "fla", "other"))
    results = {}
    results["layer"] = measure(
        "T=8192, H=32",
        {
            "dot": (ours, dict(op="dot", shape=[2048, 2048])),
            "chunk_kda": (ours, dict(op="chunk_kda", **LAYER)),
            "packed": (ours, dict(op="chunk_kda", **LAYER, documents=25)),
            "bfloat16": (ours, dict(op="chunk_kda", **LAYER, dtype="bfloat16")),
            "chunk_kda_fwd": (ours, dict(op="chunk_kda_fwd", **LAYER)),
            "recurrence": (ours, dict(op="recurrence", **LAYER)),
            "jla chunked": (jla, dict(op="chunked", **LAYER)),
            "jla scan": (jla, dict(op="scan", **LAYER)),
            "other chunk_kda": (other, dict(op="chunk_kda", **LAYER)),
            "other recurrence": (other, dict(op="recurrence", **LAYER)),
        },
    )
    results["gradient"] = measure(
        "gradients, T=8192, H=32",
        {
            "chunk_kda": (ours, dict(op="chunk_kda", **LAYER)),
            "gradient": (ours, dict(op="gradient", **LAYER)),
            "packed": (ours, dict(op="chunk_kda", **LAYER, documents=25)),
            "packed gradient": (ours, dict(op="gradient", **LAYER, documents=25)),
            "other chunk_kda": (other, dict(op="chunk_kda", **LAYER)),
            "other gradient": (other, dict(op="gradient", **LAYER)),
        },
    )
    results["long"] = measure(
        "T=65536 against T=8192, H=8",
        {
            "8192": (ours, dict(op="chunk_kda", T=8192, H=8)),
            "65536": (ours, dict(op="chunk_kda", T=65536, H=8)),
        },
    )
    results["decode"] = measure(
        "decoding, 64 sequences x 1 token, H=32",
        {
            "decode": (ours, dict(op="decode", tokens=64, H=32)),
            "touch": (ours, dict(op="touch", shape=[64, 32, 128, 128])),
        },
    )
    results["over T"] = {
        str(T): measure(
            f"T={T}, H=8",
            {
                "chunk_kda": (ours, dict(op="chunk_kda", T=T, H=8)),
                "recurrence": (ours, dict(op="recurrence", T=T, H=8)),
                "jla chunked": (jla, dict(op="chunked", T=T, H=8)),
                "jla scan": (jla, dict(op="scan", T=T, H=8)),
                "FLA naive_chunk_kda": (fla, dict(op="chunk", T=T, H=8)),
            },
        )
        for T in OVER_T
    }
    print("compilation ...", flush=True)
    results["compile"] = {
        f"T={T} N={N}": ours.ask(
            prepare="compile", op="chunk_kda", T=T, H=32, documents=N if N > 1 else None, compile_only=True
        )
        for T, N in ((2048, 1), (65536, 1), (2048, 100), (65536, 100))
    }
    return results


def ratios(results):
    """Every demand: what, against what, the ratio (None: left out), its floor, whether more is better."""
    layer, small, decode = results["layer"], results["over T"]["2048"], results["decode"]
    compiled = results["compile"]
    products = multiply_adds(**LAYER) / 2048**3  # so many large ones are the layer's own

    def over(group, slow, fast="chunk_kda"):
        """The median over rounds: what is fast in one minute and slow in the next is so for both."""
        if slow not in group:
            return None
        rounds = zip(group[slow]["rounds"], group[fast]["rounds"], strict=False)  # a slow case has fewer
        return median(x / y for x, y in rounds)

    def temporaries(result):
        return result["temporaries"] / 1e6

    long, gradient = results["long"], results["gradient"]
    seconds = [x["compile"] for x in compiled.values()]
    rows = [
        ("T=8192, H=32", "jla chunked, times faster", over(layer, "jla chunked"), 12, True),
        ("", "jla token scan, times faster", over(layer, "jla scan"), 4, True),
        ("", "own recurrence, times faster", over(layer, "recurrence"), None, True),
        ("", "the same on the other Python", over(layer, "other recurrence", "other chunk_kda"), 3, True),
        ("", "matrix-product limit, times its time", over(layer, "chunk_kda", "dot") / products, 3.5, False),
        ("", "temporaries, MB", temporaries(layer["chunk_kda"]), 64, False),
        ("T=65536, H=32", "temporaries, MB", temporaries(compiled["T=65536 N=1"]), 64, False),
        ("T=2048, H=8", "jla chunked, times faster", over(small, "jla chunked"), 8, True),
        ("", "jla token scan, times faster", over(small, "jla scan"), 2, True),
        ("", "FLA naive_chunk_kda, times faster", over(small, "FLA naive_chunk_kda"), None, True),
        ("25 documents", "the dense call, times its time", over(layer, "packed"), 1.3, False),
        ("bfloat16", "float32, times its time", over(layer, "bfloat16"), 1.1, False),
        ("T=65536, H=8", "T=8192, times its time", over(long, "65536", "8192"), 8.5, False),
        ("chunk_kda_fwd", "chunk_kda, times its time", over(layer, "chunk_kda_fwd"), 1.35, False),
        ("gradient", "chunk_kda, times its time", over(gradient, "gradient"), 4, False),
        ("", "on the other Python", over(gradient, "other gradient", "other chunk_kda"), 4, False),
        ("", "temporaries, MB", temporaries(gradient["gradient"]), 1500, False),
        ("", "25 documents, times their forward", over(gradient, "packed gradient", "packed"), None, False),
        ("compile", "seconds, the longest of four", max(seconds), 1.5, False),
        ("", "the longest over the shortest", max(seconds) / min(seconds), None, False),
        (
            "decode 64 x 1",
            "one pass over the states, times its time",
            over(decode, "decode", "touch"),
            4,
            False,
        ),
    ]
    return [dict(zip(("what", "against", "ratio", "floor", "more"), row, strict=True)) for row in rows]


def table(rows):
    for row in rows:
        if row["ratio"] is None:
            print(f"{row['what']:16s} {row['against']:44s} left out")
            continue
        floor, verdict = "", ""
        if row["floor"] is not None:
            floor = f"{'at least' if row['more'] else 'at most'} {row['floor']:g}"
            verdict = "ok" if (row["ratio"] >= row["floor"]) == row["more"] else "MISSED"
        print(f"{row['what']:16s} {row['against']:44s} {row['ratio']:7.2f}   {floor:14s} {verdict}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", help="a Python with another JAX, to time the package there too")
    parser.add_argument("--fla", help="a Python with the fla extra")
    options = parser.parse_args()
    workers = dict(ours=start("tops", sys.executable), jla=start("jla", sys.executable))
    for name, library, python in (("other", "tops", options.other), ("fla", "fla", options.fla)):
        workers[name] = start(library, python) if python else None
    versions = {name: worker.version for name, worker in workers.items() if worker}
    print("\n".join(f"{name}: {version}" for name, version in versions.items()))
    results = run(workers)
    rows = ratios(results)
    table(rows)
    machine = dict(cpus=os.cpu_count(), machine=platform.machine(), versions=versions)
    text = json.dumps(dict(machine=machine, ratios=rows, measured=results), indent=1)
    (HERE / "results.json").write_text(text + "\n")

    from plot import plot  # after the measurements: matplotlib is heavy

    plot(results["over T"], HERE / "kda.svg")


if __name__ == "__main__":
    main()
