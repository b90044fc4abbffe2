"""python -m tops.cpu.kda.testing: check a kernel, write golden files, or judge what a kernel wrote."""

import argparse
import sys

from . import adapters
from .arrays import KINDS
from .cases import select
from .compare import MULTIPLE
from .files import check_files, export
from .run import check, load
from .tiers import PRODUCTS

SIZES = ("K", "V", "H", "HV", "chunk_size")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv=None):
    args = parse(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
        say("")
        print(f"{args.parser.prog}: {error}", file=sys.stderr)
        return 2


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m tops.cpu.kda.testing", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, parser=sub)
        return sub

    text = "Judges a function with the call convention of chunk_kda, chunk_kda_fwd or chunk_kda_bwd."
    one = command("check", run_check, text)
    one.add_argument("function", help="package.module:function")
    one.add_argument("--dtype", choices=DTYPES, default="float32")
    one.add_argument("--name", help="of the kernel, in the report")
    one.add_argument(
        "--stages", action=argparse.BooleanOptionalAction, help="whether it has chunk_kda_fwd's convention"
    )
    one.add_argument(
        "--tensors", metavar="NAMES", help='as in "o,h": judge these alone; otherwise all that is returned'
    )
    for size in SIZES:
        one.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="N", help="of all cases")
    one.add_argument("--aligned", action="store_true", help="every sequence in whole chunks, and no padding")
    one.add_argument("--no-states", dest="states", action="store_false", help="no states in or out")
    one.add_argument("--gradients", action="store_true", help="judge its gradients, not its results")
    one.add_argument("--adapter", help=f"words of {adapters.EXPECTED}; or package.module:function")
    one.add_argument("--arrays", choices=KINDS, default="jax", help="what the function is given")
    two = command(
        "check-files", run_check_files, "Judges .npz files that a kernel wrote for the golden files."
    )
    two.add_argument("golden", metavar="DIR")
    two.add_argument("candidate", metavar="CANDIDATE_DIR")
    three = command(
        "export", run_export, "Writes golden files: one .npz a case and dtype, and manifest.json."
    )
    three.add_argument("directory", metavar="DIR")
    three.add_argument("--dtype", choices=DTYPES, action="append", help="may be given more than once")
    three.add_argument("--gradients", action="store_true", help="with cotangents and gradients")
    four = command("cases", run_cases, "Lists the catalogue.")
    for sub in (one, two, three, four):
        sub.add_argument(
            "--case", metavar="PATTERN", help='as in "packed*,odd" or "!masks,!resets"; all by default'
        )
    for sub in (one, two):
        sub.add_argument("--products", choices=PRODUCTS, help="what products of float32 matrices round to")
        sub.add_argument("--state-dtype", choices=("bfloat16", "float16"), help="of the state it carries")
        sub.add_argument("--multiple", type=float, default=MULTIPLE, help="of the yardstick that passes")
        sub.add_argument("--html", metavar="PATH", help="write the report there, with pictures")
    return parser.parse_args(argv)


def adapter(name):
    """Words of `adapters`, or the function that the name is of; None for None."""
    return load(name) if name and ":" in name else name


def run_check(args):
    options = judging(args) | dict(adapter=adapter(args.adapter), arrays=args.arrays)
    options |= dict(gradients=args.gradients)
    options |= dict(stages=args.stages, tensors=args.tensors and args.tensors.split(","), name=args.name)
    options |= {size: getattr(args, size) for size in (*SIZES, "aligned", "states")}
    return show(check(load(args.function), args.case, args.dtype, **options), args.html)


def run_check_files(args):
    return show(check_files(args.golden, args.candidate, cases=args.case, **judging(args)), args.html)


def judging(args):
    """What `check` and `check_files` both take."""
    options = dict(multiple=args.multiple, products=args.products, state_dtype=args.state_dtype)
    return options | dict(progress=say)


def run_export(args):
    dtypes = args.dtype or ["float32"]
    export(args.directory, select(args.case), dtypes, gradients=args.gradients, progress=say)
    say("")
    return 0


def run_cases(args):
    for case in select(args.case):
        print(f"{case.name:21}{case.why}")
    return 0


def show(report, path):
    """Prints the report, writes it as HTML where asked to; the exit status: 0, 1 where something is wrong, 3
    where nothing is and too little was judged."""
    say("")
    print(report)
    if path is not None:
        report.to_html(path)
    return 0 if report.ok else 3 if report.right else 1


def say(text):
    """Progress, on one line that the next call overwrites."""
    if sys.stderr.isatty():
        print(f"\r{text:70}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
