"""`make peers`: the conformance kit on KDA of other libraries, each in the environment that holds it.

Writes docs/peers.md: what each is flagged for, and why, as far as `why.py` knows. Ends with 1 where something
is flagged that it does not know.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

from why import WHY

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "peers.md"
SMALL = dict(B=1, H=1, HV=2)  # an interpreter is slow
# None of these libraries is told the chunk size, and a compilation for each shape takes most of the time.
CASES = "!long,!*layer,!chunk_*,!K_*"
GRADIENTS = "weak,packed,packed_no_state,softplus,sigmoid,raw"
DENSE = f"{CASES},!packed*,!softplus,!sigmoid"
BOUNDED = "sigmoid,packed_raw"  # raw gates with a lower bound
FLA_CASES = "dense,minus_5,masks,resets,one_token,packed_short,sigmoid,raw"
FLA_GRADIENTS = "dense,packed_short"


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """A function of `libraries.py`, what the page calls it, and on which cases its results and gradients are
    judged; None for no gradients."""

    environment: str  # bench, fla or mlx
    name: str
    package: str  # whose version counts
    library: str
    arguments: tuple = ()
    cases: str = CASES
    gradients: str | None = GRADIENTS
    sizes: dict = dataclasses.field(default_factory=dict)


JLA = "jax-linear-attention, `jla.ops.chunked.kda`"
PEERS = [
    Peer("bench", "tokamax, `xla`", "tokamax", "tokamax", ("xla",)),
    Peer("bench", "tokamax, `xla_chunked`", "tokamax", "tokamax_chunked", (), BOUNDED, BOUNDED),
    Peer("bench", JLA, "jax-linear-attention", "jax_linear_attention"),
    Peer("mlx", "mlx-lm, `gated_delta_ops`", "mlx-lm", "mlx_lm", (), DENSE, None),
    Peer("fla", "fla-core, `chunk_kda`", "fla-core", "fla_core", (), FLA_CASES, FLA_GRADIENTS, SMALL),
]


def judge(peer):
    """What the kit says of a peer, here and now, as JSON can hold it: {kind: (rows, declined)}."""
    import libraries

    from tops.cpu.kda.testing import VERSION, check, select

    kernel, options = getattr(libraries, peer.library)(*peer.arguments)
    found = dict(version=version(peer.package), catalogue=VERSION)
    for kind, pattern in dict(forward=peer.cases, gradients=peer.gradients).items():
        if kind == "gradients" and pattern is None:
            continue
        cases = [shrunk(case, peer.sizes) for case in select(pattern)]
        progress = partial(print, peer.name, kind, file=sys.stderr, flush=True)
        report = check(kernel, cases, **options, gradients=kind == "gradients", progress=progress)
        rows = [dict(case=row.case, ratio=row.ratio, ok=row.ok, text=str(row)) for row in report.rows]
        found[kind] = dict(rows=rows, declined=report.declined)
    return found


def shrunk(case, sizes):
    """A case in the sizes of a slow peer; of a dense one, the first chunk and six tokens."""
    if not sizes:
        return case
    T = case.T if case.cu_seqlens is not None else min(case.T, 70)
    return dataclasses.replace(case, T=T, **sizes)


def judged_elsewhere(peer, python, cache):
    """`judge` in another environment, or None where that has no such library."""
    environment = os.environ | dict(
        JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=cache, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )
    command = [python, __file__, "--judge", str(PEERS.index(peer))]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        print(f"left out: {peer.name}, which {python} cannot run")
        return None
    return json.loads(run.stdout.splitlines()[-1])


def result(found):
    """A cell of the table."""
    if found is None:
        return "not judged"
    rows = found["rows"]
    cases = dict.fromkeys(row["case"] for row in rows)
    off = dict.fromkeys(row["case"] for row in rows if not row["ok"])
    if not cases:
        return "no case"
    most = max((row["ratio"] for row in rows if row["case"] not in off), default=0)
    text = f"{len(cases) - len(off)} cases of {len(cases)}, at most {most:.2f} yardsticks off"
    return text + (f"; off: {', '.join(f'`{case}`' for case in off)}" if off else "")


INTRODUCTION = """# What other libraries show

`make peers` runs the [conformance kit](conformance.md) on KDA of other libraries, in float32 on a CPU, by the
adapters of `peers/libraries.py`, and writes this page. It is of {date}, with catalogue version {catalogue}.
A row counts the cases in which every tensor is within 2 yardsticks, and names the others.

tokamax's `xla_chunked` takes raw gates with a lower bound, mlx-lm packs nothing: they are asked for no more.
fla-core runs in Triton's interpreter, on two value heads, and on 70 tokens where it is not packed.

| library | version | forward | gradients | declined |
| --- | --- | --- | --- | --- |
"""


def page(results):
    """The page."""
    catalogue = next(iter(results.values()))["catalogue"]
    text = INTRODUCTION.format(date=f"{datetime.date.today():%-d %B %Y}", catalogue=catalogue)
    for peer, found in results.items():
        forward, gradients = found["forward"], found.get("gradients")
        declined = ", ".join(f"`{case}`" for case in forward["declined"]) or "none"
        cells = peer.name, found["version"], result(forward), result(gradients), declined
        text += f"| {' | '.join(cells)} |\n"
    for peer, found in results.items():
        for kind in ("forward", "gradients"):
            if bad := flagged(found, kind):
                text += f"\n## {peer.name}: {kind}\n"
            for case, first in bad.items():
                shown = first.replace("`", "'")
                text += f"\n- `{shown}`\n\n  {reason(peer, kind, case) or 'The cause is not known.'}\n"
    return text


def flagged(found, kind):
    """{case: what is off in it first, in words}."""
    first = {}
    for row in found[kind]["rows"] if kind in found else []:
        if not row["ok"]:
            first.setdefault(row["case"], row["text"])
    return first


def reason(peer, kind, case):
    return WHY.get((peer.package, kind, case)) or WHY.get((peer.package, kind))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for environment in dict.fromkeys(peer.environment for peer in PEERS):
        parser.add_argument(f"--{environment}", metavar="PYTHON", help="of the environment of that name")
    parser.add_argument("--judge", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge is not None:
        print(json.dumps(judge(PEERS[options.judge])))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", cache)
        results = {
            peer: judged_elsewhere(peer, getattr(options, peer.environment), cache)
            for peer in PEERS
            if getattr(options, peer.environment)
        }
    results = {peer: found for peer, found in results.items() if found}
    text = page(results)
    PAGE.write_text(text)
    print(text)
    known = [
        reason(peer, kind, case)
        for peer, found in results.items()
        for kind in ("forward", "gradients")
        for case in flagged(found, kind)
    ]
    return 0 if all(known) else 1


if __name__ == "__main__":
    sys.exit(main())
