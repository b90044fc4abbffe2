"""The report as one HTML file: the verdict, cases by tensors in colour, and pictures of what is off."""

import base64
import html
import io

import numpy as np

from .cases import CATALOGUE
from .where import STATES

try:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("to_html needs matplotlib: pip install 'tops-cpu-kda[report]'") from error

PICTURES = 24  # at most: of the first stages

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.35rem; padding: .7rem 1rem; border-radius: 6px; color: #fff; background: #1a7f37 }
h1.bad { background: #b3261e }
h2 { font-size: 1.1rem; margin-top: 2.2rem }
h3 { font-size: 1rem; margin-bottom: .2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .55rem; text-align: right; border: 1px solid #fff; white-space: nowrap }
th:first-child { text-align: left } td a { color: inherit }
.cells { overflow-x: auto } img { max-width: 100% } .note { color: #555 }
"""


def render(report):
    """The whole file, as text."""
    bad = sorted((row for row in report.rows if not row.ok), key=lambda row: row.stage)
    shown = [row for row in bad if row.picture is not None][:PICTURES]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>KDA conformance</title>",
        f"<style>{STYLE}</style>",
        f"<h1{'' if report.ok else ' class=bad'}>{html.escape(report.verdict)}</h1>",
        "<p class=note>A cell is the error over the yardstick, the error of the reference forward with the "
        "same rounding, in the worst block (one chunk of one sequence and head). "
        f"Up to {report.multiple:g} passes.</p>",
        f"<p>not judged: {html.escape(', '.join(report.missed))}</p>" if report.missed else "",
        f"<div class=cells>{_table(report, shown)}</div>",
    ]
    if bad:
        parts.append("<h2>What is off, first stages first</h2>")
    for row in bad:
        what = row.case if row.raised else f"{row.case}: {row.tensor}, {row.stage}"
        parts.append(f"<h3 id='{row.case}-{row.tensor}-{row.dtype}'>{what}</h3>")
        parts.append(f"<p>{html.escape(str(row))}</p>")
        if row in shown:
            parts.append(f"<img alt='error of {row.tensor}' src='data:image/png;base64,{_picture(row)}'>")
    return "\n".join(parts) + "</html>\n"


def _table(report, shown):
    cells = {(row.case, row.tensor, row.dtype): row for row in report.rows}
    stages = {row.tensor: row.stage for row in reversed(report.rows)}
    lines = ["<table><tr><th>case" + "".join(f"<th>{name}<br>{stages[name]}" for name in report.tensors)]
    for case, dtype in dict.fromkeys((row.case, row.dtype) for row in report.rows):
        why = html.escape(CATALOGUE[case].why) if case in CATALOGUE else ""
        line = f"<tr><th title='{why}'>{case}" + (f" {dtype}" if "," in report.dtype else "")
        for tensor in report.tensors:
            row = cells.get((case, tensor, dtype))
            if row is None:
                line += "<td>"
                continue
            text = row.cell
            if not row.ok:
                text = f"<a href='#{case}-{tensor}-{dtype}'>{text}</a>"
            line += f"<td style='background:{_colour(row.ratio, report.multiple)}'>{text}"
        lines.append(line)
    return "\n".join(lines) + "</table>"


def _colour(ratio, multiple):
    """Green to yellow as the ratio goes up to the multiple; orange to red over four decades beyond it."""
    if ratio <= multiple:
        return f"hsl({130 - 70 * ratio / multiple:.0f} 55% 82%)"
    decades = min(np.log10(ratio / multiple), 4)
    return f"hsl({30 - 7.5 * decades:.0f} 85% {78 - 5 * decades:.0f}%)"


def _picture(row):
    """The error over (token, channel) of the worst sequence and head, with the first token of each chunk."""
    error = np.where(np.isfinite(row.picture), row.picture, np.nan).T
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    axes = figure.add_subplot()
    top = np.nanmax(error, initial=0) or 1
    axes.set_facecolor("#b3261e")  # shows through where a value is not finite
    state = row.tensor in STATES
    axes.set(xlabel="key channel" if state else "token", ylabel="value channel" if state else "channel")
    picture = axes.imshow(
        np.maximum(error, 1e-5 * top), aspect="auto", interpolation="nearest", cmap="magma",
        norm=LogNorm(1e-5 * top, top), origin="lower",
    )  # fmt: skip
    title = f"|error| of {row.tensor}, sequence {row.worst['sequence']}, value head {row.worst['head']}"
    if state:
        title += f", chunk {row.worst['chunk']}"
    else:
        for token in range(row.chunk_size, error.shape[1], row.chunk_size):
            axes.axvline(token - 0.5, color="#7fd4ff", linewidth=1)
        for token in (0, error.shape[1]):
            axes.axvline(token - 0.5, color="#39ff14", linewidth=4)
        title += "; blue: chunks, green: the sequence"
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, ax=axes)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return base64.b64encode(file.getvalue()).decode()
