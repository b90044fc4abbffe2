"""How a candidate's gradients are had: by JAX's autodiff, by torch's, or from a backward of its own."""

import jax
import jax.numpy as jnp

from .arrays import as_tuple_or_dict, to_kind, to_numpy
from .gradients import FIELDS, OF

NOT_DIFFERENTIATED = ("cu_seqlens",)
BACKWARD = ("dq", "dk", "dv", "dbeta", "dg", "d_initial_state", "dA_log", "ddt_bias")
FLA = dict(db="dbeta", dh0="d_initial_state", dA="dA_log", dbias="ddt_bias")  # its names for ours


def gradients_of(fn, arrays):
    """A function of (inputs, options) to {gradient: NumPy array, or None where there is none}.

    The inputs are NumPy arrays by name, with the cotangents do and dht, and fn takes arrays of the kind
    `arrays`, "jax" or "torch".
    """
    pull = dict(jax=jax_vjp, torch=torch_autograd)[arrays]

    def call(inputs, options):
        inputs = {name: to_kind(x, arrays) for name, x in inputs.items()}
        cotangents = [inputs.pop(name) for name in ("do", "dht") if name in inputs]
        fixed = {name: inputs.pop(name) for name in NOT_DIFFERENTIATED if name in inputs}

        def outputs(given):
            made = as_tuple_or_dict(fn(**given, **fixed, **options))
            made = [made.get("o"), made.get("final_state")] if isinstance(made, dict) else list(made)
            made = [x for x in made[: len(cotangents)] if x is not None]
            if len(made) < len(cotangents):
                expected = "o" if len(cotangents) == 1 else "o and final_state"
                raise TypeError(f"expected {expected} from the kernel, got {len(made)} of them")
            return made

        made = pull(outputs, inputs, cotangents)
        return {name: to_numpy(made[of]) for name, of in OF.items() if of in made}

    return call


def jax_vjp(outputs, inputs, cotangents):
    made, pullback = jax.vjp(outputs, {name: jnp.asarray(x) for name, x in inputs.items()})
    cotangents = [x.astype(y.dtype) for x, y in zip(cotangents, made, strict=True)]
    return pullback(cotangents)[0]


def torch_autograd(outputs, inputs, cotangents):  # pragma: no cover, torch: tests/fla/test_kit.py
    import torch

    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    made = torch.autograd.grad(outputs(inputs), list(inputs.values()), cotangents, allow_unused=True)
    return dict(zip(inputs, made, strict=True))


def gradients_by(fn):
    """The same of a function of NumPy arrays in `chunk_kda_bwd`'s call convention; it may also return a dict,
    with what lies between its stages."""

    def call(inputs, options):
        given = {name: x for name, x in inputs.items() if name != "g"}
        options = {name: x for name, x in options.items() if name != "output_final_state"}
        saved = {name: given.pop(f"saved_{name}") for name in FIELDS}
        g_org = inputs["g"] if options.get("use_gate_in_kernel") else None
        states = {name: given.pop(name, None) for name in ("initial_state", "dht")}
        made = fn(**given, **states, **saved, **options, g_org=g_org)
        if not isinstance(made, dict):
            if len(made) != len(BACKWARD):
                raise TypeError(f"expected {', '.join(BACKWARD)}, or a dict of some, got {len(made)} results")
            made = dict(zip(BACKWARD, made, strict=True))
        return {FLA.get(name, name): x for name, x in made.items()}

    return call
