"""Regimes of gates, keys and beta that kernels get wrong in ways of their own, and inputs drawn in them.

Numbers are drawn by NumPy's generator in float64 and rounded to float32, then to what is asked for: the same
bits under every version of JAX, and the same values in every dtype but for that rounding.
"""

import numpy as np

REGIMES = {
    "logsigmoid": "gates logsigmoid(normal), as a model draws them",
    "weak": "the same times 1e-3: the state forgets next to nothing",
    "minus_5": "all gates -5, the strongest that safe_gate allows",
    "masks": "30 % of the gates -1000, the rest weak: a cumulative sum loses the rest to float32",
    "resets": "10 % of the gates -inf, the rest weak: a cumulative sum is NaN",
    "no_decay": "all gates 0: the plain delta rule",
    "uneven": "gates about -1e-3 to -3, every head and channel its own: a gate of the wrong one shows",
    "near_keys": "nearly equal keys, beta 1, weak gates: every token rewrites the same slot",
    "beta_0_1": "beta 0 or 1, weak gates: a token writes nothing, or replaces",
    "beta_2": "beta up to 2, weak gates: negative eigenvalues",
    "equal_keys": "equal keys, beta 1.99, gates 0: errors live for a hundred tokens",
}
FURTHER = {  # for the catalogue alone
    "strong": "30 % of the gates between -5 and -1000, the rest weak: an exponent that is clamped shows",
    "converged": "v is what the state answers up to 1e-3, beta and gates weak: a state kept in 16 bits shows",
    "small_keys": "norms of q and k from 1e-4 on, where l2norm's epsilon decides; plain sigmoid(beta)",
}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(regime="logsigmoid", B=1, T=1024, H=4, HV=None, K=64, V=None, seed=0, dtype=np.float32):
    """(q, k, v, g, beta) of one regime, rounded to `dtype`; q and k have unit norm."""
    rng = np.random.default_rng(seed)
    HV, V = HV or H, V or K
    q, k = (unit(rng.standard_normal((B, T, H, K))) for _ in range(2))
    v = rng.standard_normal((B, T, HV, V))
    beta = 1 / (1 + np.exp(-rng.standard_normal((B, T, HV))))
    g = -np.logaddexp(0, -rng.standard_normal((B, T, HV, K)))
    chance = rng.random(g.shape)
    weak = 1e-3 * g
    match regime:
        case "weak":
            g = weak
        case "minus_5":
            g = np.full_like(g, -5)
        case "masks":
            g = np.where(chance < 0.3, -1000, weak)
        case "resets":
            g = np.where(chance < 0.1, -np.inf, weak)
        case "no_decay":
            g = np.zeros_like(g)
        case "uneven":
            g = -(10 ** rng.uniform(-3, 0.5, (HV, K))) * (0.5 + chance)
        case "near_keys":
            k = unit(k[:, :1] + 0.05 * rng.standard_normal(k.shape))
            beta, g = np.ones_like(beta), weak
        case "beta_0_1":
            beta, g = np.round(beta), weak
        case "beta_2":
            beta, g = 2 * beta, weak
        case "equal_keys":
            k = np.broadcast_to(k[:, :1], k.shape)
            beta, g = np.full_like(beta, 1.99), np.zeros_like(g)
        case "strong":
            g = np.where(chance < 0.3, -(5 * 200 ** rng.random(g.shape)), weak)
        case "converged":  # v follows from the state: `Case.inputs`
            beta, g = 0.1 * beta, weak
        case "small_keys":
            q, k = (x * 10 ** rng.uniform(-4, 0, (B, T, H, 1)) for x in (q, k))
        case _:
            assert regime == "logsigmoid"
    return tuple(x.astype(np.float32).astype(dtype) for x in (q, k, v, g, beta))
