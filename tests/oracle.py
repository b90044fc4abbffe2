"""The suite's judge: the KDA recurrence in numpy float64. Its mathematics shares no code with the package."""

import itertools

import numpy as np


def relative_error(x, truth):
    """Frobenius norm of the error over that of the truth."""
    x = np.asarray(x, np.float64)
    assert x.shape == truth.shape, (x.shape, truth.shape)
    assert np.isfinite(x).all()
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


def recurrence(q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None):
    """o [B, T, HV, V] and the final states [N, HV, K, V]: one token, one sequence at a time."""
    q, k, v, g, beta, states, spans = prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    o = np.zeros_like(v)
    decay = np.exp(g)
    for S, (row, start, end) in zip(states, spans, strict=True):
        for t in range(start, end):
            S *= decay[row, t][:, :, None]
            error = v[row, t] - (k[row, t][:, None] @ S)[:, 0]
            S += k[row, t][:, :, None] * (beta[row, t][:, None] * error)[:, None]
            o[row, t] = (q[row, t][:, None] @ S)[:, 0]
    return o, states


def prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens):
    """All in float64, q scaled, q and k a head for every value head; the states that the sequences start
    from, and (row, start, end) of each."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    q, k = (np.repeat(x, HV // H, axis=2) for x in (q, k))
    if cu_seqlens is None:
        spans = [(row, 0, T) for row in range(B)]
    else:
        spans = [(0, *span) for span in itertools.pairwise(cu_seqlens)]
    states = np.zeros((len(spans), HV, K, V))
    if initial_state is not None:
        states += np.asarray(initial_state, np.float64)
    return q * (K**-0.5 if scale is None else scale), k, v, g, beta, states, spans


def walk(
    q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None, arithmetic=np.float64, raw_gates=False
):
    """The recurrence, and beside it how far rounding may carry an arithmetic that takes the same steps.

    Returns o [B, T, HV, V] and final_state [N, HV, K, V]; v_new [B, T, HV, V], what each token writes; and
    the norms that the errors of the three may reach in the dtype `arithmetic`, over V, o_budget and
    v_new_budget [B, T, HV], and over K and V, state_budget [N, HV].

    A token rounds the state that it finds and what it adds to it, each relative to its size; the next ones
    carry that on by at most the norm of their step, |1 - beta |k|^2| or 1 times the largest decay. Roundings
    are independent and add in quadrature. What lies below the least normal number may count as zero,
    also a decay over many tokens, before it meets a state that was large then.
    With `raw_gates` the arithmetic has rounded g itself: a decay is off by |g| eps, and since equal gates
    round alike, that adds up.
    """
    q, k, v, g, beta, states, spans = prepared(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    B, T, HV, V = v.shape
    K = k.shape[-1]
    o, v_new = np.zeros((2, B, T, HV, V))
    o_budget, v_new_budget = np.zeros((2, B, T, HV))
    state_budget = np.zeros((len(spans), HV))
    q_norm, k_norm, v_norm = (np.linalg.norm(x, axis=-1) for x in (q, k, v))
    eps, tiny = (float(x) for x in (np.finfo(arithmetic).eps, np.finfo(arithmetic).tiny))
    for n, (row, start, end) in enumerate(spans):
        S, own, drift = states[n], np.zeros(HV), np.zeros(HV)
        size = largest = np.linalg.norm(S, axis=(1, 2))
        for t in range(start, end):
            decay = np.exp(g[row, t])
            S *= decay[:, :, None]
            largest = np.maximum(largest, size)
            flushed = tiny * K**0.5 * (largest + V**0.5)
            size = np.linalg.norm(S, axis=(1, 2))
            off = np.linalg.norm(g[row, t][:, :, None] * S, axis=(1, 2)) if raw_gates else 0
            grown = decay.max(axis=1) * np.maximum(1, abs(1 - beta[row, t] * k_norm[row, t] ** 2))
            added = beta[row, t] * k_norm[row, t] * (v_norm[row, t] + k_norm[row, t] * size)
            own = np.hypot(grown * own, eps * (size + added) + flushed)
            drift = grown * drift + eps * off
            budget = own + drift
            error = v[row, t] - np.einsum("hk,hkv->hv", k[row, t], S)
            answer_budget = k_norm[row, t] * (budget + eps * size) + eps * v_norm[row, t]
            v_new_budget[row, t] = beta[row, t] * answer_budget
            v_new[row, t] = beta[row, t][:, None] * error
            S += k[row, t][:, :, None] * v_new[row, t][:, None, :]
            size = np.linalg.norm(S, axis=(1, 2))
            o[row, t] = np.einsum("hk,hkv->hv", q[row, t], S)
            o_budget[row, t] = q_norm[row, t] * (budget + eps * size + flushed)
        state_budget[n] = own + drift + eps * size
    budgets = dict(o_budget=o_budget, v_new_budget=v_new_budget, state_budget=state_budget)
    return dict(o=o, final_state=states, v_new=v_new, **budgets)


def stages(q, k, v, g, beta, scale, S, C):
    """Every tensor of the chunked forward of one sequence, by its definition, in float64.

    q, k, g [..., T, K], v [..., T, V], beta [..., T], S [..., K, V]; a list of one dict a chunk. Beside the
    tensors, L is what Akk inverts, I + L.
    """
    chunks = []
    for start in range(0, q.shape[-2], C):
        rows = slice(start, start + C)
        qc, kc, vc, gc = (np.asarray(x[..., rows, :], np.float64) for x in (q, k, v, g))
        b = np.asarray(beta[..., rows], np.float64)[..., None]
        n = qc.shape[-2]
        # D[i, j]: from token j to token i, 0 is the state that enters.
        D = np.zeros((*gc.shape[:-2], n + 1, n + 1, gc.shape[-1]))
        D[..., 0, 0, :] = 1
        for i in range(1, n + 1):
            D[..., i, :i, :] = D[..., i - 1, :i, :] * np.exp(gc[..., i - 1, None, :])
            D[..., i, i, :] = 1
        scores = [np.einsum("...id,...jd,...ijd->...ij", x, kc, D[..., 1:, 1:, :]) for x in (qc, kc)]
        Aqk, L = scores[0], b * np.tril(scores[1], -1)
        Akk = np.linalg.inv(np.eye(n) + L)
        k_in, qg, kg = kc * D[..., 1:, 0, :], qc * D[..., 1:, 0, :], kc * D[..., n, 1:, :]
        w, u = Akk @ (b * k_in), Akk @ (b * vc)
        v_new = u - w @ S
        o = scale * (qg @ S + Aqk @ v_new)
        made = dict(o=o, Aqk=scale * Aqk, Akk=Akk, w=w, u=u, qg=qg, kg=kg, v_new=v_new, h=S, L=L)
        chunks.append(made | dict(g=np.cumsum(gc, axis=-2) / np.log(2)))
        S = D[..., n, 0, :, None] * S + np.swapaxes(kg, -1, -2) @ v_new
    return chunks
