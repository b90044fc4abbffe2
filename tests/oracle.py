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
