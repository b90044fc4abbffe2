"""The rows of a report: what a candidate made against what is known of a case."""

import numpy as np

from .compare import MULTIPLE, compare
from .gradients import OF, stage_of
from .report import Row


def dtypes_of(name, known, dtype):
    """What a tensor may be stored in: its own dtype first, then what it may also be returned as."""
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    if name in OF:
        return [known.inputs[OF[name]].dtype, wide]
    return [wide] if name in ("g", "final_state") else [dtype] if name == "o" else [dtype, wide]


def judge_tensors(case, made, known, dtype, multiple=MULTIPLE):
    """The rows of {tensor: NumPy array or None}."""
    shapes = {name: x.shape for name, x in known.golden.items()}
    rows = []
    for name, x in made.items():
        row = Row(case.name, name, stage_of(case, name), dtype.name, chunk_size=case.chunk_size)
        dtypes = dtypes_of(name, known, dtype)
        x = None if x is None else case.standard({name: x})[name]
        if x is None:
            row = row._replace(note="was not returned")
        elif x.shape != shapes[name]:
            row = row._replace(note=f"has the shape {x.shape}, expected {shapes[name]}")
        elif x.dtype not in dtypes:
            expected = " or ".join(dict.fromkeys(d.name for d in dtypes))
            row = row._replace(note=f"is {x.dtype}, expected {expected}")
        else:
            known_of = known.golden[name], known.ours[name]
            found = compare(case, name, x, *known_of, dtype, multiple, known.gate_sum, dtypes[0])
            row = row._replace(**found, ok=bool(found["ratio"] <= multiple))
        rows.append(row)
    return rows
