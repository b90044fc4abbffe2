"""Every tensor of the chunked backward by its definition: the cotangent of a tensor of the forward.

The forward of one sequence is written out here from the definitions, in float64, with a zero added to each
tensor. The derivative by that zero is the tensor's cotangent; JAX takes it, and no formula of a backward is
used.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def chunk(q, k, v, G, beta, S, taps, scale, scores_are_fixed):
    """(o, S_out) of one chunk and head; q, k, G [n, K], G in log2, v [n, V], beta [n], S [K, V]."""
    n = len(q)
    from_start = jnp.log(2) * jnp.concatenate([jnp.zeros_like(G[:1]), G])
    later = jnp.tril(jnp.ones((n + 1, n + 1)))[..., None] > 0
    D = jnp.exp(
        jnp.where(later, from_start[:, None] - from_start, 0)
    )  # [i, j]: from token j to i, 0 the start
    scores = [jnp.einsum("id,jd,ijd->ij", x, k, D[1:, 1:]) for x in (q, k)]
    scores = [scores[0], beta[:, None] * scores[1]]
    if scores_are_fixed:
        scores = jax.lax.stop_gradient(scores)
    Aqk = jnp.tril(scores[0] + taps["dAqk"])
    L = jnp.tril(scores[1] + taps["dAkk"], -1)
    Akk = inverse(L)
    w, u = Akk @ (beta[:, None] * k * D[1:, 0]), Akk @ (beta[:, None] * v)
    v_new = u - w @ S + taps["dv_new"]
    o = scale * (q * D[1:, 0] @ S + Aqk @ (v_new + taps["dv_of_o"]))
    return o, D[n, 0][:, None] * S + (k * D[n, 1:]).T @ v_new + taps["dh"]


def inverse(L):
    """(I + L)^-1 = (I - L) (I + L^2) (I + L^4) ..., which ends, since L lies below the diagonal."""
    power, made = -L, jnp.eye(len(L)) - L
    for _ in range(len(L).bit_length()):
        power = power @ power
        made = made + made @ power
    return made


@partial(jax.jit, static_argnames=("scale", "C", "scores_are_fixed"))
def cotangents(q, k, v, G, beta, S, d_o, d_S, scale, C, scores_are_fixed):
    """Of one sequence and all heads, [HV, T, ...] each: those of q, k, v, G, beta, S, and of the taps."""
    HV, T, K = k.shape
    V = v.shape[-1]
    spans = [slice(start, min(start + C, T)) for start in range(0, T, C)]
    taps = []
    for n in (span.stop - span.start for span in spans):
        shapes = dict(dAqk=(n, n), dAkk=(n, n), dv_new=(n, V), dv_of_o=(n, V), dh=(K, V))
        taps.append({name: jnp.zeros((HV, *shape)) for name, shape in shapes.items()})

    def run(q, k, v, G, beta, S, taps):
        o = []
        for span, tap in zip(spans, taps, strict=True):
            rows = (x[:, span] for x in (q, k, v, G, beta))
            stages = partial(chunk, scale=scale, scores_are_fixed=scores_are_fixed)
            o_here, S = jax.vmap(stages)(*rows, S, tap)
            o.append(o_here)
        return jnp.concatenate(o, axis=1), S

    return jax.vjp(run, q, k, v, G, beta, S, taps)[1]((d_o, d_S))


def backward(inputs, G, states, d_o, d_states, scale, C, cu_seqlens=None):
    """{name: tensor} in the layout of the library, q and k with a head for every value head.

    dAqk, dAkk, dv_of_o (v_new's through the o of its chunk), dv_new, dh and dh0; dq, dk, dv, db and dG with
    all that comes to them; and these five as ends_dq and so on, with the scores in the chunks held fixed.
    """
    q, k, v, _, beta = (np.asarray(x, np.float64) for x in inputs)
    B, T, HV, K, V = *v.shape[:3], k.shape[-1], v.shape[-1]
    q, k = (np.repeat(x, HV // x.shape[2], axis=2) for x in (q, k))
    sequences = [(row, 0, T) for row in range(B)]
    if cu_seqlens is not None:
        sequences = [(0, *span) for span in itertools.pairwise(cu_seqlens)]
    widths = dict(dq=K, dk=K, dv=V, dG=K, dAqk=C, dAkk=C, dv_new=V, dv_of_o=V)
    widths |= {f"ends_{name}": widths[name] for name in ("dq", "dk", "dv", "dG")}
    made = {name: np.zeros((B, T, HV, width)) for name, width in widths.items()}
    made |= {name: np.zeros((B, T, HV)) for name in ("db", "ends_db")}
    made["dh0"], h = np.array(d_states, np.float64), [[] for _ in range(B)]
    for n, (row, start, end) in enumerate(sequences):
        if start == end:
            continue
        rows = (np.swapaxes(x[row, start:end], 0, 1) for x in (q, k, v, np.asarray(G, np.float64), beta, d_o))
        *heads, d_o_heads = rows
        for prefix in ("", "ends_"):
            *d_inputs, d_S, taps = cotangents(
                *heads, states[n], d_o_heads, d_states[n], scale, C, scores_are_fixed=bool(prefix)
            )
            for name, x in zip(("dq", "dk", "dv", "dG", "db"), d_inputs, strict=True):
                made[prefix + name][row, start:end] = np.swapaxes(x, 0, 1)
        made["dh0"][n] = d_S
        for i, tap in enumerate(taps):
            h[row].append(np.asarray(tap.pop("dh")))
            first = start + i * C
            for name, x in tap.items():
                made[name][row, first : first + x.shape[1], :, : x.shape[2]] = np.swapaxes(x, 0, 1)
    made["dh"] = np.array(h)
    return made
