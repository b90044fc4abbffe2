"""Adapters for what a candidate takes: activated or raw, grouped, scaled, packed, under which names."""

import numpy as np

from ...activations import Activations, activate
from ...rounding import storage
from .arrays import changed, namespace, same_kind, wide

ACTIVATIONS = {
    "qk": ("use_qk_l2norm_in_kernel",),
    "g": ("use_gate_in_kernel", "A_log", "dt_bias", "lower_bound", "safe_gate"),
    "beta": ("use_beta_sigmoid_in_kernel", "allow_neg_eigval"),
}


def activated(*names):
    """For an op that takes inputs activated: `names` of "qk", "g" and "beta", all of them by default. The
    options of these activations are not handed on."""
    names = names or tuple(ACTIVATIONS)
    if unknown := set(names) - set(ACTIVATIONS):
        raise ValueError(f"activated: expected qk, g or beta, got {sorted(unknown)[0]!r}")

    def adapter(fn):
        def adapted(*, q, k, g, beta, **options):
            given = {option: options.pop(option, None) for name in names for option in ACTIVATIONS[name]}
            given = {option: x for option, x in given.items() if x is not None and x is not False}
            activations = Activations(
                qk_l2norm="use_qk_l2norm_in_kernel" in given,
                gate="use_gate_in_kernel" in given,
                lower_bound=given.get("lower_bound"),
                beta_scale=1.0 + ("allow_neg_eigval" in given)
                if "use_beta_sigmoid_in_kernel" in given
                else None,
            )
            made = activate(
                *map(wide, (q, k, g, beta)),
                given.get("A_log"),
                given.get("dt_bias"),
                activations,
                storage(None),
            )
            q_made, k_made, g, beta = (
                same_kind(x, like) for x, like in zip(made, (q, k, g, beta), strict=True)
            )
            return fn(q=q_made.astype(q.dtype), k=k_made.astype(k.dtype), g=g, beta=beta, **options)

        return adapted

    return adapter


def ungrouped(fn):
    """For an op without grouped value heads: every value head gets a q/k head of its own."""

    def adapted(*, q, k, v, **options):
        return fn(q=_by_value_heads(q, v), k=_by_value_heads(k, v), v=v, **options)

    return adapted


def unscaled(fn):
    """For an op without a scale: q comes multiplied by it."""

    def adapted(*, q, scale=None, **options):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return fn(q=(scale * wide(q)).astype(q.dtype), **options)

    return adapted


def decays(fn):
    """For an op that takes the decays exp(g) where others take their logarithms g, which must be activated:
    `plain` or `activated` come before it."""

    def adapted(*, g, **options):
        return fn(g=namespace(g).exp(wide(g)), **options)

    return adapted


def always_l2norm(fn):
    """For an op that normalises q and k, whether asked to or not.

    Where a case does not ask for it, the same o is that of unit keys: k / n with n = |k| writes what k writes
    for beta n^2 and v / n, and o of q / |q| times |q| is that of q. So a gradient holds, too. q and k come
    2^20 times as large (2^10 in float16), so that the epsilon beside their square is lost.
    """

    def adapted(*, q, k, v, beta, use_qk_l2norm_in_kernel=False, **options):
        if use_qk_l2norm_in_kernel:
            return fn(q=q, k=k, v=v, beta=beta, **options)
        xp, larger = namespace(k), 2.0**10 if q.dtype == np.float16 else 2.0**20
        q_norm, k_norm = (_by_value_heads(xp.sqrt((wide(x) ** 2).sum(axis=-1)), v) for x in (q, k))
        beta = wide(beta) * k_norm**2
        v_unit = (wide(v) / xp.where(k_norm == 0, 1, k_norm)[..., None]).astype(v.dtype)
        q, k = ((larger * wide(x)).astype(x.dtype) for x in (q, k))
        made = fn(q=q, k=k, v=v_unit, beta=beta, **options)
        return changed(made, o=lambda o: (wide(o) * q_norm[..., None]).astype(o.dtype))

    return adapted


def always_sigmoid(fn):
    """For an op that takes the sigmoid of beta, whether asked to or not: elsewhere beta comes as its logit,
    100 at most. A beta beyond 1 is declined. Of a beta of 0 or 1 the gradient is lost."""

    def adapted(*, beta, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, **options):
        if not use_beta_sigmoid_in_kernel:
            xp, beta = namespace(beta), wide(beta)
            if xp is np and not ((beta >= 0) & (beta <= 1)).all():
                raise NotImplementedError("a beta beyond 1")
            inside = xp.clip(beta, 1e-38, 1 - 2.0**-53)
            logit = xp.log(inside) - xp.log1p(-xp.where(beta < 1, inside, 0.5))
            beta = xp.where(beta < 1, xp.maximum(logit, -100), 100).astype(beta.dtype)
        elif allow_neg_eigval:
            raise NotImplementedError("a beta beyond 1")
        return fn(beta=beta, **options)

    return adapted


def unpacked(fn):
    """For an op that does not pack: it declines what has cu_seqlens."""

    def adapted(*, cu_seqlens=None, **options):
        if cu_seqlens is not None:
            raise NotImplementedError("packing")
        return fn(**options)

    return adapted


def declines(*errors):
    """For an op that raises these errors where it cannot do something: it declines."""

    def adapter(fn):
        def adapted(**options):
            try:
                return fn(**options)
            except errors as error:
                raise NotImplementedError(str(error)) from error

        return adapted

    return adapter


def renamed(**names):
    """For other names of arguments: FLA's name = the op's, or None for what the op does not take and does
    without. Comes last: what follows would not know the names."""

    def adapter(fn):
        def adapted(**options):
            return fn(**{names.get(name, name): x for name, x in options.items() if names.get(name, name)})

        return adapted

    return adapter


def _by_value_heads(x, v):
    """x [B, T, H, ...] with a head for every value head of v."""
    return namespace(x).repeat(x, v.shape[2] // x.shape[2], axis=2)
