"""Inputs of the suite, from the conformance kit's catalogue: the regimes of the README's table."""

from tops.cpu.kda.testing.cases import REGIMES as CATALOGUE
from tops.cpu.kda.testing.cases import draw, unit

# Left to the kit: with beta 0 and no state all results are 0, and an error relative to them is nothing;
# uneven gates make the float32 recurrence itself err by 1e-6.
REGIMES = {name: why for name, why in CATALOGUE.items() if name not in ("beta_0", "uneven")}

__all__ = ["REGIMES", "draw", "unit"]
