"""Right KDA kernels in NumPy's float32, in the ways that kernels go: the conformance kit passes them all.

They take their decays from cumulative sums over their chunks, as kernels on accelerators do, or go token by
token. Nothing of the package is used, and what they mask they select.
"""

import itertools
import math

import numpy as np

LOG2_E = np.float32(1 / math.log(2))
LN_2 = np.float32(math.log(2))


def in_order(g):
    return np.cumsum(g, axis=-2)


def pairwise(g):
    """The sums of the halves, the second shifted by the first's last."""
    n = g.shape[-2]
    if n == 1:
        return g
    first, second = pairwise(g[..., : n // 2, :]), pairwise(g[..., n // 2 :, :])
    return np.concatenate([first, first[..., -1:, :] + second], axis=-2)


def log_step(g):
    """Hillis and Steele's scan: what lies 1, 2, 4, ... before is added to all at once."""
    for step in (2**i for i in range((g.shape[-2] - 1).bit_length())):
        g = np.concatenate([g[..., :step, :], g[..., step:, :] + g[..., :-step, :]], axis=-2)
    return g


SUMS = dict(in_order=in_order, pairwise=pairwise, log_step=log_step)
# The unit of the sums, and whether log2 e is multiplied in before the sum or behind.
UNITS = ("nats", "log2_before", "log2_behind")


def sums_and_exp(g, total, unit):
    """The sums of g [..., C, K] by a function of `SUMS`, in the unit, and the exponential that takes them."""
    if unit == "nats":
        return total(g), np.exp
    return (total(g * LOG2_E) if unit == "log2_before" else total(g) * LOG2_E), np.exp2


def activate(q, k, g, beta, *, A_log=None, dt_bias=None, lower_bound=None, **flags):
    """q, k, g, beta from raw ones."""
    if flags.get("use_qk_l2norm_in_kernel"):
        q, k = (x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + np.float32(1e-6)) for x in (q, k))
    if flags.get("use_gate_in_kernel"):
        a = np.float32(1) if A_log is None else np.exp(A_log)[:, None]
        g = g if dt_bias is None else g + dt_bias.reshape(g.shape[-2:])
        if lower_bound is None:
            g = -a * np.logaddexp(np.float32(0), g)
        else:
            g = np.float32(lower_bound) / (1 + np.exp(-a * g))
    if flags.get("use_beta_sigmoid_in_kernel"):
        beta = np.float32(2 if flags.get("allow_neg_eigval") else 1) / (1 + np.exp(-beta))
    return q, k, g, beta


def kernel(total=in_order, unit="log2_before", chunk=64, stages=False, state_dtype=np.float32):
    """A right kernel in `chunk_kda`'s convention, or with `stages` in `chunk_kda_fwd`'s.

    total, of `SUMS`, and unit, of `UNITS`, are how it sums gates; chunk is the size of its own chunks without
    `stages`, and 1 is token by token: a sum of one gate. It carries its state in `state_dtype`.
    """

    @np.errstate(invalid="ignore", over="ignore")  # NaN and inf go in, too
    def op(
        *, q, k, v, g, beta, scale, initial_state=None, output_final_state=False, cu_seqlens=None,
        state_v_first=False, chunk_size=64, disable_recompute=True, **raw,
    ):  # fmt: skip
        C = chunk_size if stages else chunk
        B, T, _, K = q.shape
        HV, V = v.shape[2:]
        dtype = q.dtype
        q, k, v, g, beta = (x.astype(np.float32) for x in (q, k, v, g, beta))
        q, k, g, beta = activate(q, k, g, beta, **raw)
        spans = [(b, 0, T) for b in range(B)]
        if cu_seqlens is not None:
            spans = [(0, *span) for span in itertools.pairwise(map(int, cu_seqlens))]
        # [N, HV, NT, C, ...]: every sequence in whole chunks, filled up with keys and gates of 0
        NT = max(-(-(end - start) // C) for _, start, end in spans)

        def chunks(x):
            made = np.zeros((len(spans), NT * C, *x.shape[2:]), np.float32)
            for n, (b, start, end) in enumerate(spans):
                made[n, : end - start] = x[b, start:end]
            made = np.repeat(made, HV // x.shape[2], axis=2)
            return np.moveaxis(made, 2, 1).reshape(len(spans), HV, NT, C, -1)

        def tokens(x):
            made = np.zeros((B, T, HV, x.shape[-1]), np.float32)
            x = np.moveaxis(x.reshape(len(spans), HV, NT * C, -1), 1, 2)
            for n, (b, start, end) in enumerate(spans):
                made[b, start:end] = x[n, : end - start]
            return made

        q, k, v, g, beta = chunks(q), chunks(k), chunks(v), chunks(g), chunks(beta[..., None])
        G, exp = sums_and_exp(g, total, unit)
        i = np.arange(C)
        Aqk, A = np.zeros((2, *G.shape[:3], C, C), np.float32)
        for j in i:  # a column of the scores at a time: [N, HV, NT, C - j, K] decays
            decayed = exp(apart(G[..., j:, :], G[..., j : j + 1, :])) * k[..., j : j + 1, :]
            Aqk[..., j:, j] = np.sum(q[..., j:, :] * decayed, axis=-1) * np.float32(scale)
            A[..., j:, j] = np.sum(k[..., j:, :] * decayed, axis=-1)
        L = np.where(i[:, None] > i, beta * A, np.float32(0))
        Akk = solve(L, np.broadcast_to(np.eye(C, dtype=np.float32), L.shape))
        P = exp(G)
        qg, kg = q * P, k * exp(apart(G[..., -1:, :], G))
        w, u = Akk @ (beta * k * P), Akk @ (beta * v)
        last = P[..., -1, :, None]
        S = np.zeros((len(spans), HV, K, V), np.float32)
        if initial_state is not None:
            S = initial_state.swapaxes(-1, -2) if state_v_first else initial_state
        h, v_new = np.zeros((len(spans), HV, NT, K, V), np.float32), np.zeros_like(u)
        for c in range(NT):
            h[:, :, c] = S
            v_new[:, :, c] = u[:, :, c] - w[:, :, c] @ S
            S = last[:, :, c] * S + kg[:, :, c].swapaxes(-1, -2) @ v_new[:, :, c]
            S = S.astype(state_dtype).astype(np.float32)
        o = np.float32(scale) * (qg @ h) + Aqk @ v_new
        S = S.swapaxes(-1, -2) if state_v_first else S
        made = dict(o=tokens(o).astype(dtype), final_state=S if output_final_state else None)
        if not stages:
            return tuple(made.values())
        G = G * LOG2_E if unit == "nats" else G
        made |= dict(zip(("g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new"),
                         map(tokens, (G, Aqk, Akk, w, u, qg, kg, v_new)), strict=True))  # fmt: skip
        h = h.swapaxes(-1, -2) if state_v_first else h
        h = h.swapaxes(1, 2)
        if cu_seqlens is not None:
            counts = [-(-(end - start) // C) for _, start, end in spans]
            h = np.concatenate([x[:n] for x, n in zip(h, counts, strict=True)])[None]
        return made | dict(h=h)

    return op


def apart(x, y):
    """x - y, 0 for two resets: there is none between a token and itself."""
    return np.where(x == y, np.float32(0), x - y)


def solve(L, X):
    """(I + L)^-1 X for L strictly below the diagonal, row by row."""
    X = X.copy()
    for i in range(1, L.shape[-1]):
        X[..., i, :] -= (L[..., i : i + 1, :i] @ X[..., :i, :])[..., 0, :]
    return X
