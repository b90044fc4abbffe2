"""`assert_right`: judges what a kernel returned for inputs at hand."""

import dataclasses
from functools import partial

import jax
import numpy as np

from .. import checks, chunk_kda
from .arrays import to_numpy
from .cases import Case
from .compare import MULTIPLE
from .golden import STAGES, judge
from .gradients import OF, judge_gradients, names
from .judge import judge_tensors
from .report import Report
from .run import FIELDS

ARRAYS = ("initial_state", "A_log", "dt_bias", "cu_seqlens")
OPTIONS = (
    *("scale", "output_final_state", "chunk_size", "state_v_first", "use_gate_in_kernel", "lower_bound"),
    *("safe_gate", "use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval"),
)


@dataclasses.dataclass(frozen=True)
class Call(Case):
    """A call at hand: its options are given, as (name, value) pairs, and so are its inputs."""

    given: tuple = ()

    def options(self, stages):
        scale = dict(scale=self.K**-0.5, chunk_size=self.chunk_size)
        return scale | dict(self.given) | (dict(disable_recompute=True) if stages else {})


def assert_right(result, q, k, v, g, beta, *, do=None, dht=None, multiple=MULTIPLE, **options):
    """Judges what a kernel returned for these inputs, by the tolerances of `check`.

    Args:
        result: o, or (o, final_state), or the fields of `chunk_kda_fwd` as a tuple or a dict, of which those
            that are there are judged. With `do`, a dict of gradients: any of `dq`, `dk`, `dv`, `dg`,
            `dbeta`, `d_initial_state`, `dA_log` and `ddt_bias`. Of any library's arrays, as all here.
        q, k, v, g, beta: what the kernel was given, as for `chunk_kda`. q's dtype is the kernel's.
        do: [B, T, HV, V], the cotangent of o.
        dht: [N, HV, K, V], the cotangent of the final state; None without.
        multiple: how many yardsticks a tensor may err by; see `compare`.
        options: the other arguments of `chunk_kda` that the kernel was given. chunk_size may be any of ours:
            it is that of the blocks which are judged, and of the fields of `chunk_kda_fwd`.

    Raises:
        AssertionError: with the report of `check`, when a tensor is off.
        ValueError, TypeError: in one line, when an argument is none of these.
    """
    unknown = options.keys() - {*ARRAYS, *OPTIONS}
    if unknown:
        raise TypeError(f"options: expected some of {', '.join(ARRAYS + OPTIONS)}, got {min(unknown)!r}")
    if do is None and dht is not None:
        raise TypeError("dht: expected do beside it, the cotangent of o, got None")
    given = dict(q=q, k=k, v=v, g=g, beta=beta) | {name: options.pop(name, None) for name in ARRAYS}
    if not options.get("use_gate_in_kernel"):  # what is not read without
        given |= dict(A_log=None, dt_bias=None)
        options.pop("lower_bound", None)
    inputs = {name: to_numpy(x) for name, x in given.items() if x is not None}
    options["output_final_state"] = do is None or dht is not None
    case, dtype = call_of(inputs, options)
    if do is None:
        made = fields_of(result, case)
        known = judge(case, inputs, dtype)
    else:
        made = gradients_in(result, case)
        known = judge_gradients(case, inputs | cotangents(case, do, dht), dtype)
    stages = not made.keys() <= {"o", "final_state", *OF}
    rows = judge_tensors(case, made, known, dtype, multiple)
    report = Report("the kernel", dtype.name, multiple, stages, rows, [])
    assert report.ok, str(report)


def call_of(inputs, options):
    """The `Call`, and the kernel's dtype; what `chunk_kda` refuses is refused."""
    arrays = dict(inputs)
    packing = {name: arrays.pop(name) for name in ("cu_seqlens",) if name in arrays}
    with jax.enable_x64(True):
        jax.eval_shape(partial(chunk_kda, **packing, **options), **arrays)
        dtype = np.dtype(checks.storage(inputs["q"].dtype, "q"))
    B, T, H, K = inputs["q"].shape
    HV, V = inputs["v"].shape[2:]
    options["scale"] = checks.scale_or(options.get("scale"), K**-0.5)
    options["chunk_size"] = int(options.get("chunk_size", 64))
    case = Call(
        "call",
        "inputs at hand",
        *("logsigmoid", B, T, H, HV, K, V),
        chunk_size=options["chunk_size"],
        cu_seqlens=tuple(map(int, packing["cu_seqlens"])) if packing else None,
        state=1.0 if "initial_state" in inputs else None,
        state_v_first=options.get("state_v_first", False),
        gate=tuple(name for name in ("A_log", "dt_bias") if name in inputs),
        lower_bound=options.get("lower_bound"),
        raw=bool(options.get("use_qk_l2norm_in_kernel") or options.get("use_beta_sigmoid_in_kernel")),
        given=tuple(options.items()),
    )
    return case, dtype


def cotangents(case, do, dht):
    """do and dht by name, as NumPy's, of the shapes of o and of the final state."""
    state = (case.V, case.K) if case.state_v_first else (case.K, case.V)
    shapes = dict(do=(case.B, case.T, case.HV, case.V), dht=(len(case.sequences), case.HV, *state))
    made = {name: to_numpy(x) for name, x in dict(do=do, dht=dht).items() if x is not None}
    for name, x in made.items():
        if x.shape != shapes[name]:
            raise ValueError(f"{name}: expected the shape {shapes[name]}, got {x.shape}")
    return made


def fields_of(result, case):
    """{tensor: NumPy array} of what is there of a result."""
    result = result._asdict() if hasattr(result, "_asdict") else result
    if hasattr(result, "shape"):
        result = dict(o=result)
    if isinstance(result, tuple | list):
        result = dict(zip(FIELDS, result, strict=False))
    known = ("o", "final_state") if case.raw else FIELDS
    named = isinstance(result, dict) and result.keys() <= set(FIELDS)
    made = {name: to_numpy(result[name]) for name in STAGES if result.get(name) is not None} if named else {}
    if not made or not made.keys() <= set(known):
        got = sorted(made or result, key=str) if isinstance(result, dict) else type(result).__name__
        hint = "; gradients are judged with do" if do_is_missing(result) else ""
        raise TypeError(f"result: expected some of {', '.join(known)}, got {got}{hint}")
    return made


def do_is_missing(result):
    return isinstance(result, dict) and any(name in OF for name in result)


def gradients_in(result, case):
    """{gradient: NumPy array} of a dict of them."""
    known = names(case)
    if not isinstance(result, dict) or not result or not result.keys() <= set(known):
        got = sorted(result, key=str) if isinstance(result, dict) else type(result).__name__
        raise TypeError(f"result: expected a dict of some of {', '.join(known)}, got {got}")
    return {name: to_numpy(x) for name, x in result.items()}
