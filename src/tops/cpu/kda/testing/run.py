"""`check`: runs a candidate on the catalogue and judges what it returns."""

import importlib
import inspect
from contextlib import nullcontext
from functools import partial

import jax
import numpy as np

from .. import checks
from . import adapters
from .arrays import KINDS, to_kind, to_numpy
from .autodiff import gradients_by, gradients_of, is_backward
from .cases import select
from .compare import MULTIPLE, compare
from .golden import STAGES, truth
from .gradients import BETWEEN, OF, gradient_truth, names, stage_of
from .report import Report, Row


def check(
    fn,
    cases=None,
    dtype="float32",
    *,
    stages=None,
    gradients=False,
    adapter=None,
    arrays="jax",
    multiple=MULTIPLE,
    seed=0,
    progress=None,
):
    """Judges `fn` on every case of the catalogue, tensor by tensor, against float64 goldens.

    Args:
        fn: called as `chunk_kda` or as `chunk_kda_fwd`, with the arrays and options of a case by name; only
            options that the case is about are given. It returns (o, final_state), or the fields of
            `ChunkKDAForward` as a tuple or a dict. NotImplementedError declines a case.
        cases: None for all, a pattern of names as in `select`, or `Case`s.
        dtype: of q, k, v and o: float64, float32, bfloat16 or float16.
        stages: whether fn has `chunk_kda_fwd`'s convention; None: whether it takes `disable_recompute`,
            and `use_qk_l2norm_in_kernel` not.
        gradients: judge the gradients, for cotangents of o and the final state, and not the results: those
            of `jax.vjp` of fn, or of torch's autograd. A fn with `chunk_kda_bwd`'s convention, one that takes
            do and dht, is judged so anyway: it is given what our forward saves, and returns FLA's eight
            gradients, or a dict of them, in which what `GRADIENTS` has between the stages is judged too.
        adapter: for other layouts, a function of (a function of NumPy arrays) to another, or words such as
            "plain,tokens=HBTK"; see `adapters`.
        arrays: what fn is given, "jax", "numpy" or "torch". It may return any.
        multiple: how many yardsticks a tensor may err by; see `compare`.
        seed: of the inputs.
        progress: called with a line of text before each case.

    Returns:
        A `Report`.

    Raises:
        ValueError, TypeError: in one line, when an argument is none of these.
    """
    with jax.enable_x64(True):  # a float64 candidate is given float64 whatever x64 is
        dtype = checks.storage(dtype, "dtype")
    if dtype is None:
        raise TypeError("dtype: expected float64, float32, bfloat16 or float16, got None")
    if arrays not in KINDS:
        raise ValueError(f"arrays: expected one of {', '.join(KINDS)}, got {arrays!r}")
    backward = is_backward(fn)
    stages = takes_stages(fn) if stages is None or backward else stages
    if gradients and not backward and arrays == "numpy":
        raise ValueError("arrays: expected jax or torch, which differentiate, for gradients, got 'numpy'")
    if backward:
        call = adapted(numpy_call(fn, arrays), adapter)
        judge = partial(check_gradients, gradients_by(call), saved=True)
    elif gradients:
        judge = partial(check_gradients, gradients_of(adapted(fn, adapter), arrays), saved=False)
    else:
        judge = partial(check_case, adapted(numpy_call(fn, arrays), adapter))
    cases = takes(select(cases), stages, backward)
    rows, declined = [], []
    for i, case in enumerate(cases):
        if progress is not None:
            progress(f"{case.name} ({i + 1} of {len(cases)})")
        try:
            # An adapter's own operations are float64 too, whatever x64 is.
            with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
                rows += judge(case, dtype, stages, multiple, seed)
        except NotImplementedError:
            declined.append(case.name)
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', repr(fn))}"
    return Report(name, dtype.name, multiple, backward or (stages and not gradients), rows, declined)


def adapted(call, adapter):
    """What an adapter makes of a call, or words of `adapters`; the call itself for None."""
    if isinstance(adapter, str):
        adapter = adapters.of(adapter)
    return call if adapter is None else adapter(call)


def takes_stages(fn):
    """Whether fn has `chunk_kda_fwd`'s call convention: `chunk_kda` takes that argument too."""
    if is_backward(fn):
        return True
    parameters = inspect.signature(fn).parameters
    return "disable_recompute" in parameters and "use_qk_l2norm_in_kernel" not in parameters


def takes(cases, stages, backward):
    """Those of the cases that a convention can be given: q, k and beta come raw to chunk_kda alone, and the
    cumulative sums that chunk_kda_bwd is given hold no gate of -inf."""
    return [
        case for case in cases if not (case.raw and stages) and not (case.regime == "resets" and backward)
    ]


def numpy_call(fn, arrays):
    """fn on NumPy arrays, both ways."""

    def call(**kwargs):
        made = fn(**{name: to_kind(x, arrays) for name, x in kwargs.items()})
        made = made._asdict() if hasattr(made, "_asdict") else made
        if isinstance(made, dict):
            return {name: to_numpy(x) for name, x in made.items()}
        return tuple(map(to_numpy, made))

    return call


FIELDS = ("o", "final_state", "g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h", "initial_state")


def check_case(call, case, dtype, stages, multiple=MULTIPLE, seed=0):
    """The rows of one case."""
    known = truth(case, dtype, seed)
    inputs = {name: x.copy() for name, x in known.inputs.items()}
    try:
        made = call(**inputs, **case.options(stages))
    except NotImplementedError:
        raise
    except Exception as error:
        return [raised(case, "o", STAGES["o"], dtype, error)]
    if not isinstance(made, dict):
        made = dict(zip(FIELDS if stages else FIELDS[:2], made, strict=False))
    wanted = [
        name
        for name in STAGES
        if name in known.golden
        and (stages or name in ("o", "final_state"))
        and (name != "final_state" or case.state is not None)
    ]
    return judge_tensors(case, {name: made.get(name) for name in wanted}, known, dtype, multiple)


def check_gradients(call, case, dtype, stages, multiple=MULTIPLE, seed=0, *, saved):
    """The rows of one case's gradients."""
    known = gradient_truth(case, dtype, seed, saved)
    inputs = {name: x.copy() for name, x in known.inputs.items()}
    try:
        made = call(inputs, case.options(stages))
    except NotImplementedError:
        raise
    except Exception as error:
        return [raised(case, "dq", stage_of(case, "dq"), dtype, error)]
    wanted = [name for name in names(case, saved) if name not in BETWEEN or made.get(name) is not None]
    return judge_tensors(case, {name: made.get(name) for name in wanted}, known, dtype, multiple)


def raised(case, tensor, stage, dtype, error):
    note = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Row(case.name, tensor, stage, dtype.name, note=note, raised=True)


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
        stage = STAGES[name] if name in STAGES else stage_of(case, name)
        row = Row(case.name, name, stage, dtype.name, chunk_size=case.chunk_size)
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


def load(name):
    """The object that "package.module:attribute" names."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"expected package.module:function, got {name!r}")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
