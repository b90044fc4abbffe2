"""What `check` found: rows, a verdict, the first stage that is off, a table."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from .golden import STAGES
from .gradients import GRADIENTS


class Row(NamedTuple):
    """One tensor of one case."""

    case: str
    tensor: str
    stage: str
    dtype: str
    rel: float = math.inf  # relative Frobenius error against the float64 golden
    max_abs: float = math.inf
    max_ulp: int | None = None  # in the tensor's dtype
    yardstick: float = 0.0  # rel of our own forward, rounding to the same dtype
    ratio: float = math.inf  # of the worst block, see `compare`
    worst: dict | None = None  # sequence, token, head, channel, chunk, offset
    ok: bool = False
    start: str = ""  # where the error starts
    chunk_size: int = 64
    note: str = ""  # what was returned instead of the tensor
    raised: bool = False  # nothing was: the call says nothing of its stages
    picture: np.ndarray | None = None  # the error over (token, channel), worst sequence and head

    def __str__(self):
        """The row in words, one line."""
        if self.raised:
            return f"{self.case}: {self.note}"
        text = f"{self.case}: {self.tensor} ({self.stage}) "
        if self.note:
            return text + self.note
        at = ", ".join(f"{name} {x}" for name, x in (self.worst or {}).items())
        text += f"errs {self.ratio:.3g} times the yardstick: rel {self.rel:.1e} (ours {self.yardstick:.1e})"
        text += f", max abs {self.max_abs:.1e}, {self.max_ulp} ulp; worst at {at}"
        return text + (f"; starts: {self.start}" if self.start else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """`ok` is whether every row is; a report without rows is not. `declined` lists the cases that the
    candidate raised NotImplementedError on."""

    candidate: str
    dtype: str
    multiple: float
    stages: bool
    rows: list
    declined: list

    @property
    def ok(self):
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def first_bad_stage(self):
        """The first stage with a row that is off, as in `STAGES`; None when all are well or raised, or when
        the candidate shows o and final_state alone."""
        bad = (row.stage for row in self.rows if not (row.ok or row.raised))
        return min(bad, default=None) if self.stages else None

    @property
    def verdict(self):
        bad = [row for row in self.rows if not row.ok]
        cases = {row.case for row in self.rows}
        of = f"{len(self.rows)} tensors of {len(cases)} cases in {self.dtype}"
        if self.ok:
            text = f"ok: {self.candidate}, {of}, at most {max(row.ratio for row in self.rows):.2f} yardsticks"
            text += " off"
        elif not self.rows:
            text = f"NOT OK: {self.candidate}, no case was run"
        else:
            text = (
                f"NOT OK: {self.candidate}, {len(bad)} of {of} are more than {self.multiple:g} yardsticks off"
            )
            off = len({row.case for row in bad})
            text += f" in {off} case{'s' * (off > 1)}"
            if self.first_bad_stage:
                text += f"; the first bad stage is {self.first_bad_stage}"
            if raised := sum(row.raised for row in self.rows):
                text += f"; {raised} raised"
        return text + (f"; declined: {', '.join(self.declined)}" if self.declined else "")

    @property
    def tensors(self):
        seen = {row.tensor for row in self.rows}
        return [tensor for tensor in (*STAGES, *GRADIENTS) if tensor in seen]

    def __str__(self):
        """The verdict, the ratios of cases by tensors ("!" marks what is off), and what is off in words."""
        cells = {(row.case, row.tensor): cell(row) for row in self.rows}
        width = max(12, *(1 + len(name) for name in self.tensors)) if self.rows else 12
        lines = [self.verdict, "", f"{'':17}" + "".join(f"{name:>{width}}" for name in self.tensors)]
        for case in dict.fromkeys(row.case for row in self.rows):
            lines.append(
                f"{case:17}" + "".join(f"{cells.get((case, name), ''):>{width}}" for name in self.tensors)
            )
        bad = sorted((row for row in self.rows if not row.ok), key=lambda row: row.stage)
        return "\n".join([*lines, *[""] * bool(bad), *map(str, bad)])

    def to_html(self, path):
        """Writes the report as one HTML file that needs no network; needs matplotlib, the extra `report`."""
        from .html import render

        with open(path, "w", encoding="utf-8") as file:
            file.write(render(self))


def cell(row):
    """A ratio for a table."""
    return f"{row.ratio:.2f}" if row.ok else f"!{row.ratio:.3g}"
