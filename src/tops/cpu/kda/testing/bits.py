"""Checks to the bit: what no rounding excuses. Each runs a kernel on one small case, changes what must not
matter, and holds what must stay to the bits of the first run.

    causality     tokens change: no earlier output does
    neighbours    a batch row, the heads of a q/k head or one value head change: no other does
    containment   NaN or inf in one sequence, its state included, or in padding: no other sequence changes
    determinism   nothing changes
"""

from typing import NamedTuple

import numpy as np

from .report import BITS, Row


class Probe(NamedTuple):
    """Changed inputs, in words what they are, and what they may not change, as masks."""

    what: str
    inputs: dict
    o: np.ndarray  # [B, T, HV]
    final_state: np.ndarray  # [N, HV]


def bit_rows(call, case, dtype, tensors, seed=0):
    """The rows of the check `case.bits`: of each of the tensors, o and final_state; call takes the arrays of
    a case and returns {tensor: NumPy array or None}."""
    inputs = case.inputs(dtype, seed)
    found = dict.fromkeys(tensors)
    first = call(copied(inputs))
    for probe in CHECKS[case.bits](case, inputs, case.inputs(dtype, seed + 1)):
        made = call(copied(probe.inputs))
        for tensor in tensors:
            if found[tensor] is None:
                kept = getattr(probe, tensor)
                found[tensor] = difference(probe.what, tensor, first.get(tensor), made.get(tensor), kept)
    row = dict(rel=0.0, max_abs=0.0, max_ulp=0, ratio=0.0, ok=True)
    return [
        Row(case.name, tensor, BITS, dtype.name, **(dict(note=note) if note else row))
        for tensor, note in found.items()
    ]


def copied(inputs):
    return {name: x.copy() for name, x in inputs.items()}


def difference(what, tensor, x, y, kept):
    """Where two runs differ in what is to be kept, in words, or None."""
    if x is None or y is None:
        return "was not returned"
    if x.shape != y.shape or x.shape[: kept.ndim] != kept.shape:
        return f"has the shapes {x.shape} and {y.shape} in two runs"
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    differs = ~((x == y) | (np.isnan(x) & np.isnan(y))) & kept.reshape(
        *kept.shape, *[1] * (x.ndim - kept.ndim)
    )
    if not differs.any():
        return None
    at = np.argwhere(differs)[0][: kept.ndim]
    axes = ("row", "token", "value head") if tensor == "o" else ("sequence", "value head")
    at = ", ".join(f"{axis} {i}" for axis, i in zip(axes, at, strict=True))
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)[differs]
    by = "to what is not finite" if not np.isfinite(apart).all() else f"by up to {apart.max():.1e}"
    return f"changes {by} with {what}; first at {at}"


TOKENS = ("q", "k", "v", "g", "beta")


def changed(inputs, others, where, states=None):
    """Inputs with the tokens of the mask `where` [B, T] taken from others, and the states of a mask [N]."""
    made = copied(inputs)
    for name in TOKENS:
        made[name][where] = others[name][where]
    if states is not None and "initial_state" in made:
        made["initial_state"][states] = others["initial_state"][states]
    return made


def masks(case):
    """All True, for o and for the states."""
    return np.ones((case.B, case.T, case.HV), bool), np.ones((len(case.sequences), case.HV), bool)


def causality(case, inputs, others):
    """Boundaries of chunks and what lies in them; the last token is one too."""
    C = case.chunk_size
    for t in sorted({min(t, case.T - 1) for t in (1, C // 2 + 5, C, case.T - 1)}):
        o, states = masks(case)
        later = np.arange(case.T)[None].repeat(case.B, 0) >= t
        o[later] = False
        yield Probe(f"what comes from token {t} on", changed(inputs, others, later), o, states & False)


def neighbours(case, inputs, others):
    row = np.zeros((case.B, case.T), bool)
    row[-1] = True
    o, states = masks(case)
    o[-1] = states[-1] = False
    yield Probe(
        f"batch row {case.B - 1}", changed(inputs, others, row, np.arange(case.B) == case.B - 1), o, states
    )
    group = case.HV // case.H
    heads = [(f"q/k head {case.H - 1} and its value heads", ("q", "k"), range(case.HV - group, case.HV))]
    heads.append((f"value head {case.HV - 1}", (), (case.HV - 1,)))
    for what, shared, own in heads:
        made, (o, states) = copied(inputs), masks(case)
        own = list(own)
        for name in shared:
            made[name][:, :, -1] = others[name][:, :, -1]
        for name in ("v", "g", "beta"):
            made[name][:, :, own] = others[name][:, :, own]
        if "initial_state" in made:
            made["initial_state"][:, own] = others["initial_state"][:, own]
        o[:, :, own] = states[:, own] = False
        yield Probe(what, made, o, states)


def containment(case, inputs, others):
    """Of every second sequence with tokens, and of padding; the sequences between are to stay."""
    full = [n for n, (_, start, end) in enumerate(case.sequences) if end > start][1::2]
    for bad in (np.nan, np.inf):
        poison = {name: np.full_like(x, bad) for name, x in inputs.items() if name != "cu_seqlens"}
        where, (o, states) = np.zeros((case.B, case.T), bool), masks(case)
        for n in full:
            row, start, end = case.sequences[n]
            where[row, start:end] = True
        o[where] = states[full] = False
        which = ", ".join(map(str, full))
        yield Probe(
            f"{bad} in sequence{'s' * (len(full) > 1)} {which}",
            changed(inputs, poison, where, full),
            o,
            states,
        )
        padding = np.ones((case.B, case.T), bool)
        for row, start, end in case.sequences:
            padding[row, start:end] = False
        if padding.any():
            o, states = masks(case)
            o[padding] = False  # what lies there is nobody's
            yield Probe(f"{bad} in the padding", changed(inputs, poison, padding), o, states)


def determinism(case, inputs, others):
    yield Probe("another run of the same call", inputs, *masks(case))


CHECKS = dict(causality=causality, neighbours=neighbours, containment=containment, determinism=determinism)
