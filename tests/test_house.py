"""Who may import whom, and where tricks and rules for autodiff stand: the house of `docs/algorithm.md`."""

import ast
import re
from pathlib import Path

import pytest

import tops.cpu.kda

HOUSE = Path(tops.cpu.kda.__file__).parent
STAGES = {"one_chunk.intra", "one_chunk.wy", "one_chunk.state", "one_chunk.output"}
BELOW = {"one_chunk.decay", "one_chunk.triangle"}
# What a module may import of the package. Every other module is a public op.
ALLOWED = {
    "naive": set(),
    "rounding": set(),
    "pullback": set(),
    "activations": set(),
    "one_chunk.xla": set(),
    "one_chunk.decay": {"one_chunk.xla"},
    "one_chunk.triangle": {"one_chunk.xla"},
    **dict.fromkeys(STAGES, BELOW | {"one_chunk.xla"}),
    "one_chunk": STAGES | {"one_chunk.decay", "one_chunk.xla"},
    "chunking": {"one_chunk.xla"},
    "checks": {"chunking"},  # whose messages count chunks
    "contracts": {"checks", "chunking"},
    "scan": {"chunking", "one_chunk", "one_chunk.xla", "activations", "pullback", "rounding"},
}
MODULES = {
    ".".join(path.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
    if "testing" not in path.parts and path.name != "__main__.py" and path.parent.name != "kda"
} | {path.stem: path for path in HOUSE.glob("*.py") if path.stem not in ("__init__", "__main__")}


def imports(name):
    """The modules of the package that one imports."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            base = parts[: len(parts) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{module}.{x.name}".strip(".") for x in node.names}
            found |= {x if x in MODULES else module for x in names}
    return found - {name}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    allowed = ALLOWED.get(name, set(MODULES) - {"naive", "pullback"})
    assert imports(name) <= allowed, f"{name} may import {sorted(allowed)}"


TRICKS = r"optimization_barrier|__version_info__|set_xla_metadata|platform_dependent|jax\._src"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "one_chunk.xla"])
def test_tricks_for_the_compiler_stand_in_one_file(name):
    assert not re.findall(TRICKS, MODULES[name].read_text())


def test_rules_for_autodiff():
    """That which joins the scans; those of the sums of g and of infinite gates are in no stage."""
    rules = {
        name: len(re.findall(r"@.*custom_[jv][vj]p", path.read_text())) for name, path in MODULES.items()
    }
    assert {name: n for name, n in rules.items() if n} == {"pullback": 1, "activations": 2}


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_package_names_itself_relatively(path):
    """So that a copy of the folder is a package by itself."""
    assert not re.findall(r"^\s*(?:from|import) tops", path.read_text(), re.MULTILINE)
