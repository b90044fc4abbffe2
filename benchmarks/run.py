"""The benchmark, `make bench`: one process a library, interleaved rounds, medians, ratios within one run.

Prints a table of ratios beside their aims, and writes results.json and kda.svg beside this file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

from ratios import ratios, table

HERE = Path(__file__).parent
ROUNDS = 15  # the same call has a fast and a slow time on some machines, for seconds on end
SLOW_ROUNDS = 5  # of a call that takes longer than three seconds
LAYER = dict(T=8192, H=32)  # K = V = 128 throughout
SMALL = dict(T=2048, H=8)
OVER_T = (512, 1024, 2048, 4096, 8192)
FIRST_CALLS_OVER_T = (1984, 2048, 2112, 2176)


def sized(cases, **size):
    return {name: (library, case | size) for name, (library, case) in cases.items()}


def with_gradients(cases):
    gradients = {
        f"{name} gradient": (library, case | dict(gradient="beside results"))
        for name, (library, case) in cases.items()
    }
    return cases | gradients


RAW_GATES = {
    "chunk_kda": ("ours", dict(op="raw_gates")),
    "tokamax xla": ("tokamax", dict(op="xla")),
    "tokamax xla_chunked": ("tokamax", dict(op="xla_chunked")),
}
RAW_GRADIENTS = with_gradients(RAW_GATES)
# The gradient of tokamax xla keeps 1.8 MB a token at H=8, and its time grows faster than T.
RAW_SHORT = {name: RAW_GRADIENTS[name] for name in ("chunk_kda gradient", "tokamax xla gradient")}
RAW_SMALL = {name: case for name, case in RAW_GRADIENTS.items() if name != "tokamax xla gradient"}
FIRST_CALLS = with_gradients(RAW_GATES | {"jla chunked": ("jla", dict(op="chunked"))})
OVER_T_CASES = {
    "chunk_kda": ("ours", dict(op="chunk_kda")),
    "recurrence": ("ours", dict(op="recurrence")),
    "jla chunked": ("jla", dict(op="chunked")),
    "jla scan": ("jla", dict(op="scan")),
    "FLA naive_chunk_kda": ("fla", dict(op="chunk")),
}
LAYER_CASES = {
    "chunk_kda": ("ours", dict(op="chunk_kda")),
    "packed": ("ours", dict(op="chunk_kda", documents=25)),
    "bfloat16": ("ours", dict(op="chunk_kda", dtype="bfloat16")),
    "chunk_kda_fwd": ("ours", dict(op="chunk_kda_fwd")),
    "recurrence": ("ours", dict(op="recurrence")),
    "jla chunked": ("jla", dict(op="chunked")),
    "jla scan": ("jla", dict(op="scan")),
    "other chunk_kda": ("other", dict(op="chunk_kda")),
    "other recurrence": ("other", dict(op="recurrence")),
}
GRADIENT_CASES = {
    "chunk_kda": ("ours", dict(op="chunk_kda")),
    "gradient alone": ("ours", dict(op="chunk_kda", gradient="alone")),
    "gradient beside results": ("ours", dict(op="chunk_kda", gradient="beside results")),
    "packed": ("ours", dict(op="chunk_kda", documents=25)),
    "packed gradient alone": ("ours", dict(op="chunk_kda", documents=25, gradient="alone")),
    "other chunk_kda": ("other", dict(op="chunk_kda")),
    "other gradient alone": ("other", dict(op="chunk_kda", gradient="alone")),
}
LONG_CASES = {
    "8192": ("ours", dict(op="chunk_kda", T=8192, H=8)),
    "65536": ("ours", dict(op="chunk_kda", T=65536, H=8)),
}
DECODE_CASES = {
    "decode": ("ours", dict(op="decode", tokens=64, H=32)),
    "touch": ("ours", dict(op="touch", shape=[64, 32, 128, 128])),
}
GROUPS = {
    "layer": (
        "T=8192, H=32",
        {"dot": ("ours", dict(op="dot", shape=[2048, 2048]))} | sized(LAYER_CASES, **LAYER),
    ),
    "gradient": ("gradients, T=8192, H=32", sized(GRADIENT_CASES, **LAYER)),
    "raw layer": ("raw gates, T=8192, H=32", sized(RAW_GATES, **LAYER)),
    "raw small": ("raw gates, T=2048, H=8", sized(RAW_SMALL, **SMALL)),
    "raw short": ("raw gates, T=512, H=8", sized(RAW_SHORT, T=512, H=8)),
    "long": ("T=65536 against T=8192, H=8", LONG_CASES),
    "decode": ("decoding, 64 sequences x 1 token, H=32", DECODE_CASES),
}


class Worker:
    def __init__(self, library, python):
        command = [python, str(HERE / "worker.py"), library]
        pipe = subprocess.PIPE
        self.library, self.python = library, python
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


def measure(title, cases, workers):
    """{name: {seconds, rounds, compile, temporaries}} of the cases, in interleaved rounds."""
    print(f"{title} ...", flush=True)
    cases = {name: (workers[key], case) for name, (key, case) in cases.items() if workers[key]}
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
        print(f"    {name:28s} {results[name]['seconds']:8.3f} s", flush=True)
    return results


def first_calls(workers):
    """{name: {rounds, seconds}} of tracing, lowering and compiling for a shape that the process has not seen.

    A process a case, since a forward and its gradient share traces. The first shape warms it up.
    """
    print("first calls ...", flush=True)
    cases = {name: case for name, case in FIRST_CALLS.items() if workers[case[0]]}
    fresh = {name: Worker(workers[key].library, workers[key].python) for name, (key, _) in cases.items()}
    results = {name: dict(rounds=[]) for name in cases}
    for T in FIRST_CALLS_OVER_T:
        for name, (_, case) in cases.items():
            cost = fresh[name].ask(prepare=name, **case, T=T, H=8, compile_only=True)
            results[name]["rounds"].append(cost["compile"])
    for name, result in results.items():
        fresh[name].process.communicate()
        del result["rounds"][0]
        result["seconds"] = median(result["rounds"])
        print(f"    {name:28s} {result['seconds']:8.3f} s", flush=True)
    return results


def run(workers):
    results = {key: measure(title, cases, workers) for key, (title, cases) in GROUPS.items()}
    results["over T"] = {
        str(T): measure(f"T={T}, H=8", sized(OVER_T_CASES, T=T, H=8), workers) for T in OVER_T
    }
    results["first call"] = first_calls(workers)
    print("compilation ...", flush=True)
    results["compile"] = {
        f"T={T} N={N}": workers["ours"].ask(
            prepare="compile", op="chunk_kda", T=T, H=32, documents=N if N > 1 else None, compile_only=True
        )
        for T, N in ((2048, 1), (65536, 1), (2048, 100), (65536, 100))
    }
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", help="a Python with another JAX, to time the package there too")
    parser.add_argument("--fla", help="a Python with the fla extra")
    options = parser.parse_args()
    workers = dict(ours=start("tops", sys.executable))
    workers |= {library: start(library, sys.executable) for library in ("jla", "tokamax")}
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
