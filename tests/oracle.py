"""The suite's judge: the KDA recurrence in numpy float64. Shares no code with the package."""

import itertools

import numpy as np


def recurrence(q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None):
    """o [B, T, HV, V] and the final states [N, HV, K, V]: one token, one sequence at a time."""
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
    o = np.zeros((B, T, HV, V))
    for (row, start, end), S in zip(spans, states, strict=True):
        for t in range(start, end):
            S *= np.exp(g[row, t])[:, :, None]
            error = v[row, t] - np.einsum("hk,hkv->hv", k[row, t], S)
            S += beta[row, t][:, None, None] * k[row, t][:, :, None] * error[:, None, :]
            o[row, t] = np.einsum("hk,hkv->hv", q[row, t], S)
    return o * (K**-0.5 if scale is None else scale), states


def relative_error(x, truth):
    """Frobenius norm of the error over that of the truth."""
    x = np.asarray(x, np.float64)
    assert x.shape == truth.shape, (x.shape, truth.shape)
    assert np.isfinite(x).all()
    return np.linalg.norm(x - truth) / np.linalg.norm(truth)


def stages(q, k, v, g, beta, scale, S, C):
    """Every tensor of the chunked forward of one sequence and head, by its definition, in float64.

    q, k, g [T, K], v [T, V], beta [T], S [K, V]; a list of one dict a chunk.
    """
    chunks = []
    for start in range(0, len(q), C):
        rows = slice(start, start + C)
        qc, kc, vc, gc, bc = (np.asarray(x[rows], np.float64) for x in (q, k, v, g, beta))
        n = len(qc)
        D = np.ones(
            (n + 1, n + 1, gc.shape[1])
        )  # D[i, j]: from token j to token i, 0 is the state that enters
        for i in range(1, n + 1):
            for j in range(i):
                D[i, j] = np.exp(gc[j:i]).prod(axis=0)
        Aqk = np.array(
            [[(qc[i] * kc[j] * D[i + 1, j + 1]).sum() * (j <= i) for j in range(n)] for i in range(n)]
        )
        L = np.array(
            [[(kc[i] * kc[j] * D[i + 1, j + 1]).sum() * (j < i) for j in range(n)] for i in range(n)]
        )
        Akk = np.linalg.inv(np.eye(n) + bc[:, None] * L)
        qg, kg = qc * D[1:, 0], kc * D[n, 1:]
        w, u = Akk @ (bc[:, None] * kc * D[1:, 0]), Akk @ (bc[:, None] * vc)
        v_new = u - w @ S
        o = scale * (qg @ S + Aqk @ v_new)
        made = dict(
            o=o, g=np.cumsum(gc, axis=0) / np.log(2), Aqk=scale * Aqk, Akk=Akk, w=w, u=u, qg=qg, kg=kg
        )
        chunks.append(made | dict(v_new=v_new, h=S))
        S = D[n, 0][:, None] * S + kg.T @ v_new
    return chunks
