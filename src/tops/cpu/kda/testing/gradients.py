"""What a case's gradients are, in float64, and what our own backwards make of them in a candidate's dtype."""

from functools import cache, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from .. import (
    chunk_gated_delta_rule_bwd_dhu,
    chunk_kda,
    chunk_kda_bwd_dAv,
    chunk_kda_bwd_intra,
    chunk_kda_bwd_wy_dqkg_fused,
    chunk_kda_fwd,
    chunk_local_cumsum,
    kda_gate_bwd,
)
from ..activations import Activations, activate
from ..rounding import storage
from .compare import SAFE, largest_sum, summed
from .golden import FAST_COMPILE, STAGES, Truth, cast, gates
from .tiers import EXACT, farthest, tiered

# In the order in which a backward makes them: what FLA's op for each stage returns.
MADE_BY = {
    "5 output backwards": ("dAqk", "dv_of_o"),  # chunk_kda_bwd_dAv
    "6 state backwards": ("dv_new", "dh", "d_initial_state"),  # chunk_gated_delta_rule_bwd_dhu
    "7 WY backwards": ("dq_wy", "dk_wy", "dv", "dbeta_wy", "dG_wy", "dAkk"),  # chunk_kda_bwd_wy_dqkg_fused
    "8 intra backwards": ("dq", "dk", "dbeta", "dG", "dg"),  # chunk_kda_bwd_intra, and sums behind it
    "9 gate backwards": ("dA_log", "ddt_bias"),  # kda_gate_bwd, which makes dg of raw gates too
}
GRADIENTS = {name: stage for stage, made in MADE_BY.items() for name in made}
OF = dict(dq="q", dk="k", dv="v", dbeta="beta", dg="g", d_initial_state="initial_state")
OF |= dict(dA_log="A_log", ddt_bias="dt_bias")
BETWEEN = tuple(name for name in GRADIENTS if name not in OF)  # its stages: autodiff shows none
FIELDS = ("g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h")


def stage_of(case, name):
    """That of the forward or of the backward which makes a tensor."""
    return (STAGES | GRADIENTS)["dA_log" if name == "dg" and case.is_gate_raw else name]


def names(case, between=False):
    """The gradients that a case has, with or without those between the stages of a backward."""
    given = ("q", "k", "v", "g", "beta", *case.gate, *(() if case.state is None else ("initial_state",)))
    return [name for name in GRADIENTS if (between if name in BETWEEN else OF[name] in given)]


@lru_cache(maxsize=32)
def gradient_truth(case, dtype, seed=0, saved=False, tier=EXACT):
    """`Truth` of a case's gradients for a candidate of `dtype`, in a tier of arithmetic; its inputs hold do
    and dht, the cotangents.

    With `saved`, for a candidate in `chunk_kda_bwd`'s convention: the inputs hold what our forward saves,
    and the gradients those between the stages.
    """
    inputs = case.inputs(dtype, seed) | case.cotangents(dtype, seed)
    return judge_gradients(case, inputs, dtype, saved, tier)


def judge_gradients(case, inputs, dtype, saved=False, tier=EXACT):
    """`gradient_truth` of inputs at hand.

    The golden is `jax.vjp` of our `chunk_kda` in float64. The yardstick is FLA's stages chained by hand, with
    `storage_dtype`. They read every decay from cumulative sums, and so does every backward that starts from a
    forward's fields. Who is not given those may err so only where no gate is below -5 a token; elsewhere the
    yardstick is `jax.vjp` of our forward with `storage_dtype`. In 16 bits either may err more, by where it
    rounds, and the farther one counts.
    """
    dtype = np.dtype(dtype)
    wide = cast(inputs, np.float64)
    rounded = (cast(inputs, np.float32), np.float32) if dtype == np.float64 else (inputs, dtype)
    golden = run(case, by_autodiff, wide)
    backwards = [by_stages] if saved or gates(case, inputs).min() >= -SAFE else [by_autodiff]
    if dtype.itemsize == 2 and not saved:
        backwards = [*dict.fromkeys([*backwards, by_autodiff])]
    throws = [(backward, grid) for backward in backwards for grid in tier.grids]
    ours, *others = (run(case, backward, *rounded, tier, grid) for backward, grid in throws)
    if saved:
        exact = run(case, by_stages, wide)
        golden |= {name: exact[name] for name in BETWEEN}
        inputs = inputs | saved_fields(case, exact if dtype == np.float64 else ours, dtype)
    golden = case.standard({name: golden[name] for name in names(case, saved)})
    ours = farthest(golden, list(map(case.standard, (ours, *others))))
    scale = 2.0**-28 if dtype == np.float64 else 1.0
    error = {name: scale * np.abs(ours[name] - x) for name, x in golden.items()}
    for name, least in roundings_of_dg(case, wide, golden, dtype).items():
        error[name] = np.maximum(error[name], least)
    ours = {name: x + error[name] for name, x in golden.items()}
    return Truth(inputs, golden, ours, largest_sum(case, gates(case, inputs)))


def roundings_of_dg(case, inputs, golden, dtype):
    """{gradient: what it may err by at least}, of dg and of what is made of it.

    Kernels make dg as a sum back over a chunk of q dq - k dk, whose terms cancel: where no state is read, as
    in a sequence of one token, to exactly 0. What stays are the roundings of the terms, here over as many
    tokens as a chunk has, of whichever sequence: chunks that do not start with the sequences are a
    kernel's right.
    """
    # Positive and in float64: a difference of their sums loses nothing that a yardstick needs.
    terms = np.abs(inputs["q"] * golden["dq"]) + np.abs(inputs["k"] * golden["dk"])
    before = np.pad(terms.cumsum(axis=1), ((0, 0), (1, summed(case)), (0, 0), (0, 0)), mode="edge")
    before[:, 0] = 0
    sums = np.repeat(before[:, summed(case) :] - before[:, : -summed(case)], case.HV // case.H, axis=2)
    sums = sums[:, : case.T] * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps) / 2
    made = dict(dg=sums, dG_wy=sums, dG=sums)
    if case.is_gate_raw:
        gate = (inputs.get(name) for name in ("A_log", "dt_bias"))
        with jax.enable_x64(True):
            raw = kda_gate_bwd(inputs["g"], *gate, sums, case.lower_bound)
        raw = dict(zip(("dg", "dA_log", "ddt_bias"), raw, strict=True))
        made |= {name: np.abs(x) for name, x in raw.items() if x is not None}
    return {name: x for name, x in made.items() if name in golden}


def saved_fields(case, fields, dtype):
    """What our forward saved, as a kernel of `dtype` stores it."""
    stored = {name: x.astype(np.float64 if dtype == np.float64 else np.float32) for name, x in fields.items()}
    stored["h"] = stored["h"][:, : case.standard(dict(h=fields["h"]))["h"].shape[1]]
    return {f"saved_{name}": stored[name] if name == "g" else stored[name].astype(dtype) for name in FIELDS}


def run(case, backward, inputs, storage_dtype=None, tier=EXACT, grid=1.0):
    """{name: float64} of one of our backwards, on a CPU, with states as the case has them."""
    options = case.options(stages=False) | dict(chunk_size=case.chunk_size)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        made = program(backward, storage_dtype, tuple(options.items()), tier)(inputs, np.float32(grid))
    return {name: np.asarray(x, np.float64) for name, x in made.items() if x is not None}


@cache
def program(backward, storage_dtype, options, tier):
    """One for all the cases that share options; it compiles once for those that share shapes."""
    op = partial(backward, options=dict(options), storage_dtype=storage_dtype)
    return jax.jit(lambda inputs, grid: tiered(op, *tier, grid)(inputs), compiler_options=FAST_COMPILE)


def by_autodiff(inputs, options, storage_dtype):
    """{gradient} of `jax.vjp` of `chunk_kda`."""
    fixed = {name: inputs[name] for name in ("cu_seqlens",) if name in inputs}
    given = {name: x for name, x in inputs.items() if name not in ("cu_seqlens", "do", "dht")}

    def op(given):
        made = chunk_kda(**given, **fixed, **options, storage_dtype=storage_dtype)
        return made if "dht" in inputs else made[0]

    cotangents = (inputs["do"], inputs["dht"]) if "dht" in inputs else inputs["do"]
    (made,) = jax.vjp(op, given)[1](cotangents)
    return {name: made[of] for name, of in OF.items() if of in made}


def by_stages(inputs, options, storage_dtype):
    """{gradient, or field of the forward} of FLA's forward and its stages backwards, chained by hand."""
    given, options = dict(inputs), dict(options)
    take = options.pop
    stored = dict(storage_dtype=storage_dtype)
    l2norm, beta_range = take("use_qk_l2norm_in_kernel", False), 1.0 + take("allow_neg_eigval", False)
    sigmoid = take("use_beta_sigmoid_in_kernel", False)
    raw = Activations(qk_l2norm=l2norm, beta_scale=beta_range if sigmoid else None)
    do, dht, cu_seqlens = given.pop("do"), given.pop("dht", None), given.get("cu_seqlens")
    q, k, v, g, beta = (given.pop(name) for name in ("q", "k", "v", "g", "beta"))

    def activated(q, k, beta):
        wide = (x.astype(jnp.promote_types(q.dtype, jnp.float32)) for x in (q, k))
        made = activate(*wide, None, beta, None, None, raw, storage(storage_dtype))
        return made[0].astype(q.dtype), made[1].astype(k.dtype), made[3]

    (q, k, beta), pullback = jax.vjp(activated, q, k, beta)
    fields = chunk_kda_fwd(q, k, v, g, beta, **given, **options, disable_recompute=True, **stored)
    scale, layout = options["scale"], dict(state_v_first=options.get("state_v_first", False))
    chunks = dict(chunk_size=options["chunk_size"], cu_seqlens=cu_seqlens)
    made = {name: x for name, x in fields._asdict().items() if name in FIELDS}
    dAqk, dv_of_o = chunk_kda_bwd_dAv(q, k, fields.v_new, do, fields.Aqk, scale, **chunks, **stored)
    made |= dict(dAqk=dAqk, dv_of_o=dv_of_o)
    dh, d_initial_state, dv_new = chunk_gated_delta_rule_bwd_dhu(
        *(fields.qg, fields.kg, fields.w, do, dv_of_o),
        **dict(gk=fields.g, h0=given.get("initial_state"), dht=dht, scale=scale),
        **(chunks | layout | stored),
    )
    made |= dict(dh=dh, d_initial_state=d_initial_state, dv_new=dv_new)
    dq, dk, dv, dbeta, dG, dAkk = chunk_kda_bwd_wy_dqkg_fused(
        *(q, k, v, fields.v_new, fields.g, beta, fields.Akk, fields.h, do, dh, dv_new, scale),
        **(chunks | layout | stored),
    )
    made |= dict(dq_wy=dq, dk_wy=dk, dv=dv, dbeta_wy=dbeta, dG_wy=dG, dAkk=dAkk)
    dq, dk, dbeta, dG = chunk_kda_bwd_intra(q, k, fields.g, beta, dAqk, dAkk, dq, dk, dbeta, dG, **chunks)
    dg = chunk_local_cumsum(dG, chunks["chunk_size"], True, cu_seqlens=cu_seqlens, output_dtype=dG.dtype)
    if options.get("use_gate_in_kernel"):
        A_log, dt_bias = given.get("A_log"), given.get("dt_bias")
        dg, *parameters = kda_gate_bwd(g, A_log, dt_bias, dg, options.get("lower_bound"))
        made |= dict(zip(("dA_log", "ddt_bias"), parameters, strict=True))
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[-1]).sum(3).astype(q.dtype) for x in (dq, dk))
    dq, dk, dbeta = pullback((dq, dk, dbeta.astype(beta.dtype)))
    return made | dict(dq=dq, dk=dk, dbeta=dbeta, dG=dG, dg=dg)
