"""What a compiled program does, read from its HLO: collectives and the arithmetic of its products."""

import math
import re

COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all)[\w-]*\("
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


def collectives(compiled):
    """(operation, number of values of its result) of every collective."""
    found = COLLECTIVE.findall(compiled.as_text())
    return sorted((name, math.prod(shape_of(shape))) for shape, name in found)


def shape_of(text):
    """The dimensions in "f32[2,3]{1,0}"."""
    return [int(n) for n in re.search(r"\[([\d,]*)\]", text)[1].split(",") if n]


def product_flops(compiled, branch=max):
    """Floating-point operations of all products: a loop's body as often as it runs, of branches the largest.

    XLA's own `cost_analysis` counts a loop's body once.
    """
    computations, entry, lines = {}, None, None
    for line in compiled.as_text().splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$", line)
        if header:
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif lines is not None:
            lines.append(line)
    assert entry

    def count(name):
        shapes, total = {}, 0
        for line in computations[name]:
            instruction = INSTRUCTION.match(line)
            if not instruction:
                continue
            name, shape, operation, rest = instruction.groups()
            shapes[name] = shape
            if operation == "dot":
                left = shape_of(shapes[re.search(r"%?([\w.-]+)[,)]", rest.split("} ")[-1])[1]])
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1].split(",")
                total += 2 * math.prod(shape_of(shape)) * math.prod(left[int(axis)] for axis in axes)
            elif operation == "while":
                trips = int(re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)[1])
                total += trips * count(re.search(r"body=%?([\w.-]+)", rest)[1])
            elif operation == "conditional":
                branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", rest)
                if not branches:
                    branches = re.findall(r"[\w.-]+", re.search(r"branch_computations=\{(.*?)\}", rest)[1])
                total += branch(count(name) for name in branches)
            elif operation in ("call", "fusion"):
                total += count(re.search(r"(?:calls|to_apply)=%?([\w.-]+)", rest)[1])
        return total

    return count(entry)
