"""The properties on fresh examples, as many or as long as told, with progress; `make fuzz`.

A failure is shrunk, and printed as the call that reproduces it.
"""

import argparse
import random
import re
import sys
import time
import traceback

import conftest  # noqa: F401  the suite's platform and precision: no pytest loads it for a script
from hypothesis import HealthCheck, Phase, given, seed, settings
from properties import PROPERTIES

ROUND = 4  # examples of a property of share 1, between two lines of progress


def main():
    parser = argparse.ArgumentParser(prog="python tests/fuzz.py", description=__doc__)
    parser.add_argument("--examples", type=int, default=2000, help="how many at least (default 2000)")
    parser.add_argument("--seconds", type=float, help="how long, instead")
    parser.add_argument("--seed", type=int, help="repeats a run")
    args = parser.parse_args()
    root = random.randrange(2**32) if args.seed is None else args.seed
    print(f"--seed {root}", flush=True)
    draw_seed = random.Random(root).randrange
    start = time.perf_counter()
    done = dict.fromkeys(PROPERTIES, 0)

    def finished():
        if args.seconds is not None:
            return time.perf_counter() - start >= args.seconds
        return sum(done.values()) >= args.examples

    while not finished():
        for check, (arguments, share) in PROPERTIES.items():
            if not run(check, arguments, ROUND * share, draw_seed(2**32), done):
                return 1
            report(done, time.perf_counter() - start)
            if finished():
                break
    print(f"\n{sum(done.values())} examples in {time.perf_counter() - start:.0f} s, no failure")
    for check, count in done.items():
        print(f"  {check.__name__:24}{count}")
    return 0


def run(check, arguments, examples, number, done):
    """Whether `check` holds for that many examples."""

    def counted(**drawn):
        done[check] += 1
        check(**drawn)

    counted.__name__ = counted.__qualname__ = check.__name__
    chosen = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    try:
        chosen(seed(number)(given(**arguments)(counted)))()
    except Exception as failure:
        notes = "\n".join(getattr(failure, "__notes__", []))
        call = re.search(rf"{check.__name__}\(.*?^\)", notes, re.DOTALL | re.MULTILINE)
        call = " ".join((call.group() if call else notes).split())
        print(f"\n\n{''.join(traceback.format_exception(failure, chain=False))}\nTo reproduce:\n")
        print(f'PYTHONPATH=tests python -c "import conftest; from properties import *; {call}"')
        return False
    return True


def report(done, seconds):
    total = sum(done.values())
    print(f"\r{total} examples, {seconds:.0f} s, {total / seconds:.1f} a second", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
