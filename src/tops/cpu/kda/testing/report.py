"""What `check` found: rows, a verdict, the first stage that is off, a table."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from .coverage import LEAST
from .golden import STAGES
from .gradients import GRADIENTS

BITS = "bits"  # the stage of a check to the bit, behind all others


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
    not_finite: str = ""  # which sequences have NaN or inf
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
        if self.not_finite:
            return text + f"{self.not_finite}; starts: {self.start}; first worst at {at}"
        text += f"errs {self.ratio:.3g} times the yardstick: rel {self.rel:.1e} (ours {self.yardstick:.1e})"
        text += f", max abs {self.max_abs:.1e}, {self.max_ulp} ulp; worst at {at}"
        return text + (f"; starts: {self.start}" if self.start else "")

    @property
    def cell(self):
        """The ratio for a table, "!" before what is off."""
        return f"{self.ratio:.2f}" if self.ok else "!NaN" if self.not_finite else f"!{self.ratio:.3g}"


@dataclasses.dataclass(frozen=True)
class Report:
    """`ok` is whether every row is, and enough of the cases asked for were judged. `declined` lists the cases
    that the candidate raised NotImplementedError on, `missed` in words what no judged case asks of it."""

    candidate: str
    dtype: str
    multiple: float
    stages: bool
    rows: list
    declined: list
    missed: list = dataclasses.field(default_factory=list)

    @property
    def right(self):
        """Whether every row is."""
        return all(row.ok for row in self.rows)

    @property
    def enough(self):
        """Whether `LEAST` of the cases asked for was judged."""
        judged = len({row.case for row in self.rows})
        return judged > 0 and judged >= LEAST * (judged + len(self.declined))

    @property
    def ok(self):
        return self.right and self.enough

    @property
    def first_bad_stage(self):
        """The first stage with a row that is off, as in `STAGES`; None when all are well or raised, or when
        the candidate shows o and final_state alone."""
        bad = (row.stage for row in self.rows if not (row.ok or row.raised))
        return min(bad, default=None) if self.stages else None

    @property
    def verdict(self):
        parts = [f"{'ok' if self.ok else 'NOT OK'}: {self.candidate}, {self._compared()}", *self._also()]
        return "; ".join(parts)

    def _compared(self):
        """What the comparisons with goldens say."""
        rows = [row for row in self.rows if row.stage != BITS and not row.note]
        if not rows:
            return f"no {'tensor was compared' if self.rows else 'case was run'}"
        of = f"{len(rows)} tensors of {len({row.case for row in rows})} cases in {self.dtype}"
        bad = [row for row in rows if not row.ok]
        if not bad:
            return f"{of}, at most {max(row.ratio for row in rows):.2f} yardsticks off"
        off = len({row.case for row in bad})
        text = f"{len(bad)} of {of} are more than {self.multiple:g} yardsticks off"
        return f"{text} in {off} case{'s' * (off > 1)}"

    def _also(self):
        """The other parts of the verdict."""
        stage = self.first_bad_stage
        if stage not in (None, BITS):
            yield f"the first bad stage is {stage}"

        def cases(rows):
            return ", ".join(dict.fromkeys(row.case for row in rows))

        bits = [row for row in self.rows if row.stage == BITS]
        for what, rows in {
            "not finite in": [row for row in self.rows if row.not_finite],
            "missing, or not as it should be, in": [
                row for row in self.rows if row.note and not row.raised and row.stage != BITS
            ],
            "raised in": [row for row in self.rows if row.raised],
            "not the same to the bit:": [row for row in bits if not row.ok],
        }.items():
            if rows:
                yield f"{what} {cases(rows)}"
        if bits and all(row.ok for row in bits):
            yield f"to the bit: {cases(bits)}"
        if not self.enough:
            judged = len({row.case for row in self.rows})
            yield f"{judged} of {judged + len(self.declined)} cases could be judged, less than {LEAST:.0%}"
        if self.declined:
            n = len(self.declined)
            yield f"declined: {', '.join(self.declined)}" if n <= 5 else f"declined: {n} cases"

    @property
    def tensors(self):
        seen = {row.tensor for row in self.rows}
        return [tensor for tensor in (*STAGES, *GRADIENTS) if tensor in seen]

    def __str__(self):
        """The verdict, what was not judged, the ratios of cases by tensors, "!" before what is off, and that
        in words."""
        cells = {(row.case, row.tensor): row.cell for row in self.rows}
        lines = [self.verdict, *[f"not judged: {', '.join(self.missed)}"] * bool(self.missed), ""]
        width = max(12, *(1 + len(name) for name in self.tensors)) if self.rows else 12
        lines.append(f"{'':21}" + "".join(f"{name:>{width}}" for name in self.tensors))
        for case in dict.fromkeys(row.case for row in self.rows):
            lines.append(
                f"{case:21}" + "".join(f"{cells.get((case, name), ''):>{width}}" for name in self.tensors)
            )
        bad = sorted((row for row in self.rows if not row.ok), key=lambda row: row.stage)
        return "\n".join([*lines, *[""] * bool(bad), *map(str, bad)])

    def to_html(self, path):
        """Writes the report as one HTML file that needs no network; needs matplotlib, the extra `report`."""
        from .html import render

        with open(path, "w", encoding="utf-8") as file:
            file.write(render(self))
