"""`check`: runs a candidate on the catalogue and judges what it returns."""

import importlib
from contextlib import nullcontext

import jax
import numpy as np

from .. import checks
from . import adapters
from .arrays import KINDS, as_tuple_or_dict, to_kind, to_numpy
from .autodiff import gradients_by, gradients_of
from .bits import bit_rows
from .cases import select
from .compare import MULTIPLE
from .convention import RESULTS, Convention
from .coverage import missed
from .fit import fit
from .golden import truth
from .gradients import gradient_truth, stage_of
from .judge import judge_tensors
from .report import Report, Row
from .tiers import EXACT, Tier


def check(
    fn,
    cases=None,
    dtype="float32",
    *,
    stages=None,
    gradients=False,
    tensors=None,
    adapter=None,
    arrays="jax",
    products=None,
    state_dtype=None,
    multiple=MULTIPLE,
    seed=0,
    name=None,
    progress=None,
    **dims,
):
    """Judges `fn` on every case of the catalogue, tensor by tensor, against float64 goldens.

    Args:
        fn: called as `chunk_kda`, `chunk_kda_fwd` or `chunk_kda_bwd`, with the arrays and options of a case
            by name; only options that the case is about are given. It returns (o, final_state), or the
            fields of `ChunkKDAForward` as a tuple or a dict; all but o and the final state may be missing.
            NotImplementedError declines a case. What a convention cannot be asked is left out, or declined
            where nothing else is asked. With `chunk_kda_bwd`'s convention, which is one that takes do and
            dht, fn is given what our forward saves, and returns FLA's eight gradients, or a dict of them, in
            which what `GRADIENTS` has between the stages is judged too.
        cases: None for all, a pattern of names as in `select`, a `Case` or several.
        dtype: of q, k, v and o: float64, float32, bfloat16 or float16.
        stages: whether fn has `chunk_kda_fwd`'s convention; None: whether it takes `disable_recompute`,
            and `use_qk_l2norm_in_kernel` not.
        gradients: judge, in place of the results, the gradients for cotangents of o and the final state, by
            `jax.vjp` of fn or torch's autograd.
        tensors: names of `STAGES`, or of `GRADIENTS`: these alone are judged, and must be there.
        adapter: for other layouts, a function of (a function of NumPy arrays) to another, or words such as
            "plain,tokens=HBTK"; see `adapters`.
        arrays: what fn is given, "jax", "numpy" or "torch". It may return any.
        products: what fn's products of float32 matrices round their operands to, by JAX's name:
            "TF32_TF32_F32", "BF16_BF16_F32", "BF16_BF16_F32_X3"; see `tiers`. None: they do not.
        state_dtype: bfloat16 or float16 where fn carries its state so; None: as wide as its arithmetic.
        multiple: how many yardsticks a tensor may err by; see `compare`.
        seed: of the inputs, an integer of at least 0.
        name: the candidate's, in the report; None: its module's and its own.
        progress: called with a line of text before each case.
        dims: K, V, H, HV, chunk_size, aligned, states: make the cases such as fn takes, by `fit`.

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
    checks.integer("seed", seed, "an integer")
    checks.require(seed >= 0, "seed", "at least 0", seed)
    tier = Tier.of(products, state_dtype, dtype)
    how = Convention.of(fn, stages, gradients)
    if how.gradients and not how.backward and arrays == "numpy":
        raise ValueError("arrays: expected jax or torch, which differentiate, for gradients, got 'numpy'")
    if tensors is not None and not (tensors and set(tensors) <= set(how.known)):
        raise ValueError(f"tensors: expected some of {', '.join(how.known)}, got {tensors!r}")
    call = caller(fn, how, arrays, adapter)
    selected = select(cases)
    asked = [case for case in selected if how.takes(case) and tier.judges(case)]
    cases = [case for case in (fit(case, **dims) for case in asked) if case is not None]
    rows, declined = [], [] if cases else selected
    for i, case in enumerate(cases):
        if progress is not None:
            progress(f"{case.name} ({i + 1} of {len(cases)})")
        try:
            # An adapter's own operations are float64 too, whatever x64 is.
            with jax.enable_x64(True) if dtype == np.float64 else nullcontext():
                rows += check_case(call, case, dtype, how, multiple, seed, tensors, tier)
        except NotImplementedError:
            declined.append(case)
    if name is None:
        name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', repr(fn))}"
    returned = {row.tensor for row in rows}
    answered = {row.case for row in rows if not row.raised}
    judged = [case for case in cases if case.name in answered]
    absent = {tensor for case in judged for tensor in how.tensors(case, tensors)} - returned
    words = missed(asked, judged, declined) + [tensor for tensor in how.known if tensor in absent]
    declined = [case.name for case in declined]
    return Report(name, f"{dtype.name}{tier}", multiple, how.names_stages, rows, declined, words)


def caller(fn, how, arrays, adapter):
    """A function of (inputs, options), NumPy arrays by name, to {tensor: NumPy array or None}."""
    if how.backward:
        return gradients_by(adapted(numpy_call(fn, arrays), adapter))
    if how.gradients:
        return gradients_of(adapted(fn, adapter), arrays)
    op = adapted(numpy_call(fn, arrays), adapter)

    def call(inputs, options):
        made, names = op(**inputs, **options), FIELDS if how.stages else RESULTS
        return made if isinstance(made, dict) else dict(zip(names, made, strict=False))

    return call


def adapted(call, adapter):
    """What an adapter makes of a call, or words of `adapters`; the call itself for None."""
    if isinstance(adapter, str):
        adapter = adapters.of(adapter)
    return call if adapter is None else adapter(call)


def numpy_call(fn, arrays):
    """fn on NumPy arrays, both ways."""

    def call(**kwargs):
        made = fn(**{name: to_kind(x, arrays) for name, x in kwargs.items()})
        made = as_tuple_or_dict(made)
        if isinstance(made, dict):
            return {name: to_numpy(x) for name, x in made.items()}
        return tuple(map(to_numpy, made))

    return call


FIELDS = ("o", "final_state", "g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h", "initial_state")


def check_case(call, case, dtype, how, multiple=MULTIPLE, seed=0, tensors=None, tier=EXACT):
    """The rows of one case."""
    names, options = how.tensors(case, tensors), how.options(case)
    if how.gradients:
        known = gradient_truth(case, dtype, seed, how.backward, tier)
    else:
        known = None if case.bits else truth(case, dtype, seed, tier)
    try:
        if case.bits:
            return bit_rows(lambda inputs: call(inputs, options), case, dtype, names, seed)
        made = call({name: x.copy() for name, x in known.inputs.items()}, options)
    except NotImplementedError:
        raise
    except Exception as error:
        note = f"raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        tensor = "dq" if how.gradients else "o"
        return [Row(case.name, tensor, stage_of(case, tensor), dtype.name, note=note, raised=True)]
    required = how.required if tensors is None else tensors
    names = [name for name in names if name in required or made.get(name) is not None]
    return judge_tensors(case, {name: made.get(name) for name in names}, known, dtype, multiple)


def load(name):
    """The object that "package.module:attribute" names."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"expected package.module:function, got {name!r}")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found
