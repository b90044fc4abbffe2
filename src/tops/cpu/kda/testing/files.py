"""Golden files, for kernels that are not called from Python.

DIR/manifest.json names for each case and dtype a file `CASE.DTYPE.npz` with the arrays

    input.NAME       what the kernel is given; do and dht are the cotangents of o and the final state
    option.NAME      its other arguments, numbers and flags
    golden.TENSOR    the result in float64
    rounded.TENSOR   the same in the dtype that the kernel stores it in

bfloat16, which NumPy's format does not know, is stored as its bits in uint16. A kernel writes a file of the
same name with an array per tensor, named `o`, `final_state`, `g`, ..., of its shape. Nothing is unpickled.
"""

import hashlib
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .cases import CATALOGUE, VERSION, select
from .compare import MULTIPLE
from .golden import STAGES, judge, truth
from .gradients import GRADIENTS, gradient_truth, judge_gradients, names
from .judge import dtypes_of, judge_tensors
from .report import Report, Row
from .tiers import Tier


def export(directory, cases, dtypes, seed=0, gradients=False, progress=None):
    """Writes the golden files of the cases, with gradients or without, and the manifest, into a directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    versions = dict(catalogue=VERSION, jax=jax.__version__, numpy=np.__version__)
    manifest = dict(versions=versions, seed=seed, files={})
    for dtype in map(jnp.dtype, dtypes):
        for case in cases:
            name = f"{case.name}.{dtype.name}.npz"
            if progress is not None:
                progress(name)
            if case.bits:  # which take several calls
                continue
            known = truth(case, dtype, seed)
            if gradients:
                pulled = gradient_truth(case, dtype, seed)
                known = known._replace(inputs=pulled.inputs, golden=known.golden | pulled.golden)
            arrays = {f"input.{key}": x for key, x in known.inputs.items()}
            arrays |= {f"option.{key}": np.array(x) for key, x in case.options(not case.raw).items()}
            for tensor, x in known.golden.items():
                arrays[f"golden.{tensor}"] = x
                with np.errstate(over="ignore"):
                    arrays[f"rounded.{tensor}"] = x.astype(dtypes_of(tensor, known, dtype)[0])
            shapes = {key: dict(shape=x.shape, dtype=x.dtype.name) for key, x in arrays.items()}
            np.savez(directory / name, **{key: _bits(x) for key, x in arrays.items()})
            manifest["files"][name] = dict(
                case=case.name,
                why=case.why,
                dtype=dtype.name,
                sha256=_sha256(directory / name),
                arrays=shapes,
            )
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def check_files(
    directory, candidates, multiple=MULTIPLE, progress=None, *, cases=None, products=None, state_dtype=None
):
    """A `Report` on the files that a kernel wrote: every file of the manifest must be there, with `o` and
    `final_state`; of the other tensors those that it holds are judged. `cases`, `products` and `state_dtype`
    are as for `check`."""
    directory, candidates = Path(directory), Path(candidates)
    manifest = json.loads((directory / "manifest.json").read_text())
    found = manifest["versions"]["catalogue"]
    if found != VERSION:
        raise ValueError(f"{directory}/manifest.json: expected catalogue {VERSION}, got {found}")
    wanted = {case.name for case in select(cases)}
    files = {name: entry for name, entry in manifest["files"].items() if entry["case"] in wanted}
    rows = []
    for name, entry in files.items():
        if progress is not None:
            progress(name)
        if _sha256(directory / name) != entry["sha256"]:
            raise ValueError(f"{directory / name}: expected the sha256 of the manifest, got another")
        case, dtype = CATALOGUE[entry["case"]], jnp.dtype(entry["dtype"])
        tier = Tier.of(products, state_dtype, dtype)
        if not tier.judges(case):
            continue
        if not (candidates / name).exists():
            rows.append(
                Row(case.name, "o", STAGES["o"], dtype.name, note=f"{candidates / name} is not there")
            )
            continue
        arrays = _load(directory / name, {key: x["dtype"] for key, x in entry["arrays"].items()})
        inputs = {key.removeprefix("input."): x for key, x in arrays.items() if key.startswith("input.")}
        golden = {key.removeprefix("golden."): x for key, x in arrays.items() if key.startswith("golden.")}
        forward = {key: x for key, x in inputs.items() if key not in ("do", "dht")}
        known = judge(case, forward, dtype, tier)._replace(inputs=inputs, golden=golden)
        required = ["o"] if case.state is None else ["o", "final_state"]
        if "do" in inputs:
            known.ours.update(judge_gradients(case, inputs, dtype, tier=tier).ours)
            required += names(case)
        made = _load(candidates / name, {})
        made = {key: x.view(jnp.bfloat16) if x.dtype == np.uint16 else x for key, x in made.items()}
        tensors = [tensor for tensor in golden if tensor in made or tensor in required]
        rows += judge_tensors(case, {tensor: made.get(tensor) for tensor in tensors}, known, dtype, multiple)
    dtypes = ", ".join(dict.fromkeys(entry["dtype"] for entry in files.values()))
    dtypes += str(Tier.of(products, state_dtype, None))
    stages = any(row.tensor not in ("o", "final_state", *GRADIENTS) for row in rows)
    return Report(str(candidates), dtypes, multiple, stages, rows, [])


def _load(path, dtypes):
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file of arrays, got what NumPy does not read") from error
    return {key: x.view(jnp.bfloat16) if dtypes.get(key) == "bfloat16" else x for key, x in arrays.items()}


def _bits(x):
    return x.view(np.uint16) if x.dtype == jnp.bfloat16 else x


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
