"""Inputs of the suite: the regimes of the conformance kit's catalogue."""

from tops.cpu.kda.testing.regimes import REGIMES, draw, unit

__all__ = ["REGIMES", "draw", "unit"]
