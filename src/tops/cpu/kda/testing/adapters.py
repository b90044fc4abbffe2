"""For candidates that are called in other ways: each turns a function of NumPy arrays into another.

An adapter of one's own is such a function; it raises NotImplementedError for what the candidate cannot do.
"""

import numpy as np

from ..activations import Activations, activate
from ..rounding import storage

ACTIVATIONS = ("A_log", "dt_bias", "lower_bound", "use_gate_in_kernel", "safe_gate")


def plain(fn):
    """For an op with the recurrence's arguments alone (scale, initial_state, output_final_state, cu_seqlens):
    the inputs are activated before it, states are turned, and it need not know of chunks."""

    def adapted(*, q, k, v, g, beta, chunk_size=None, state_v_first=False, initial_state=None, **options):
        dtype = q.dtype
        wide = np.float64 if dtype == np.float64 else np.float32
        given = {name: options.pop(name, None) for name in ACTIVATIONS}
        activations = Activations(
            qk_l2norm=options.pop("use_qk_l2norm_in_kernel", False),
            gate=bool(given["use_gate_in_kernel"]),
            lower_bound=given["lower_bound"],
            beta_scale=(1.0 + options.pop("allow_neg_eigval", False))
            if options.pop("use_beta_sigmoid_in_kernel", False)
            else None,
        )
        q, k, g, beta = activate(
            *(x.astype(wide) for x in (q, k, g, beta)),
            given["A_log"],
            given["dt_bias"],
            activations,
            storage(None),
        )
        if initial_state is not None:
            options["initial_state"] = np.ascontiguousarray(_turn(initial_state, state_v_first))
        q, k, g, beta = (
            np.asarray(q).astype(dtype),
            np.asarray(k).astype(dtype),
            np.asarray(g),
            np.asarray(beta),
        )
        o, final_state = fn(q=q, k=k, v=v, g=g, beta=beta, **options)
        return o, None if final_state is None else _turn(final_state, state_v_first)

    return adapted


def head_first(fn):
    """For an op on [B, H, T, ...]: q, k, v, g, beta and o are turned; states are as they are."""

    def adapted(*, q, k, v, g, beta, **options):
        tokens = dict(q=q, k=k, v=v, g=g, beta=beta)
        turned = {name: np.ascontiguousarray(x.swapaxes(1, 2)) for name, x in tokens.items()}
        o, *rest = fn(**turned, **options)
        return o.swapaxes(1, 2), *rest

    return adapted


def ungrouped(fn):
    """For an op without grouped value heads: every value head gets a q/k head of its own."""

    def adapted(*, q, k, v, **options):
        q, k = (np.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
        return fn(q=q, k=k, v=v, **options)

    return adapted


def segment_ids(fn):
    """For an op that packs by segment_ids [B, T], the number of each token's sequence, and keeps no states of
    the sequences: it declines what has states and packs; padding is a segment of its own."""

    def adapted(*, q, k, v, g, beta, cu_seqlens=None, **options):
        if cu_seqlens is None:
            return fn(q=q, k=k, v=v, g=g, beta=beta, **options)
        if options.get("output_final_state"):
            raise NotImplementedError("segment ids have no states")
        ids = np.searchsorted(cu_seqlens[1:], np.arange(q.shape[1]), side="right").astype(np.int32)
        return fn(q=q, k=k, v=v, g=g, beta=beta, segment_ids=ids[None], **options)

    return adapted


def _turn(states, state_v_first):
    return states.swapaxes(-1, -2) if state_v_first else states
