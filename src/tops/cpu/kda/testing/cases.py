"""The catalogue: named inputs that a KDA kernel must get right, deterministic from (name, dtype, seed).

Numbers are drawn by NumPy's generator in float64 and rounded to float32, then to what the case is asked for:
the same bits under every version of JAX, and the same values in every dtype but for that rounding.
"""

import dataclasses
import fnmatch
import itertools
import zlib

import numpy as np

from .where import OF_CHUNKS, STATES

VERSION = 1  # of the catalogue: goes up when a name comes to mean other numbers

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
        case _:
            assert regime == "logsigmoid"
    return tuple(x.astype(np.float32).astype(dtype) for x in (q, k, v, g, beta))


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `state` is the size of the initial state's elements, None for no states in and out."""

    name: str
    why: str
    regime: str = "logsigmoid"
    B: int = 2
    T: int = 150
    H: int = 2
    HV: int = 4
    K: int = 32
    V: int = 24
    chunk_size: int = 64
    cu_seqlens: tuple | None = None
    scale: float | None = None
    state: float | None = 1.0
    state_v_first: bool = False
    gate: tuple = ()  # which of A_log and dt_bias a raw gate comes with; none: g is a log decay
    lower_bound: float | None = None
    raw: bool = False  # q, k and beta come raw too: for `chunk_kda` alone, `chunk_kda_fwd` does not take them

    @property
    def sequences(self):
        """[(row of the batch, first token, end)] of each sequence."""
        if self.cu_seqlens is None:
            return [(row, 0, self.T) for row in range(self.B)]
        return [(0, *span) for span in itertools.pairwise(self.cu_seqlens)]

    def inputs(self, dtype=np.float32, seed=0):
        """The arrays of the call by name, as NumPy's: q, k, v in `dtype`, the others in float32, or float64
        beside it; cu_seqlens int64."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        sizes = dict(B=self.B, T=self.T, H=self.H, HV=self.HV, K=self.K, V=self.V)
        wide = np.float64 if dtype == np.float64 else np.float32
        arrays = dict(
            zip(
                ("q", "k", "v", "g", "beta"),
                draw(self.regime, **sizes, seed=rng.integers(2**63)),
                strict=True,
            )
        )
        if self.raw:
            arrays["q"], arrays["beta"] = 3 * arrays["q"], normal(rng, self.B, self.T, self.HV)
            arrays["k"] = np.where(rng.random((self.B, self.T, self.H, 1)) < 0.1, 0, 0.5 * arrays["k"])
        if self.is_gate_raw:
            arrays["g"] = normal(rng, self.B, self.T, self.HV, self.K)
            made = dict(A_log=normal(rng, self.HV), dt_bias=normal(rng, self.HV * self.K))
            arrays |= {name: made[name] for name in self.gate}
        if self.state is not None:
            state = (self.V, self.K) if self.state_v_first else (self.K, self.V)
            arrays["initial_state"] = np.float32(self.state) * normal(
                rng, len(self.sequences), self.HV, *state
            )
        arrays = {name: x.astype(dtype if name in "qkv" else wide) for name, x in arrays.items()}
        if self.cu_seqlens is not None:
            arrays["cu_seqlens"] = np.array(self.cu_seqlens, np.int64)
        return arrays

    def cotangents(self, dtype=np.float32, seed=0):
        """The cotangents by name: do in `dtype`, and dht in the states' where the case has any."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode()), 1])
        wide = np.float64 if dtype == np.float64 else np.float32
        cotangents = dict(do=normal(rng, self.B, self.T, self.HV, self.V).astype(dtype))
        if self.state is not None:
            state = (self.V, self.K) if self.state_v_first else (self.K, self.V)
            cotangents["dht"] = normal(rng, len(self.sequences), self.HV, *state).astype(wide)
        return cotangents

    @property
    def chunks(self):
        """[(sequence, row of the batch, chunk of the sequence, first token, end)], in sequence order."""
        return [
            (n, row, c, first, min(first + self.chunk_size, end))
            for n, (row, start, end) in enumerate(self.sequences)
            for c, first in enumerate(range(start, end, self.chunk_size))
        ]

    def standard(self, tensors):
        """Tensors of a call with states [K, V] and without chunks that no sequence needs."""
        turned = STATES if self.state_v_first else ()
        tensors = {name: np.swapaxes(x, -1, -2) if name in turned else x for name, x in tensors.items()}
        NT = sum(row == 0 for _, row, *_ in self.chunks)
        return {name: x[:, :NT] if name in OF_CHUNKS else x for name, x in tensors.items()}

    @property
    def is_gate_raw(self):
        return bool(self.gate) or self.lower_bound is not None

    def options(self, stages):
        """The other keyword arguments, for `chunk_kda_fwd` with `stages`, else for `chunk_kda`; those at the
        default are left out, but for the scale, which FLA has no default for."""
        options = dict(scale=self.K**-0.5 if self.scale is None else self.scale)
        if self.state is not None:
            options["output_final_state"] = True
        if stages or self.chunk_size != 64:
            options["chunk_size"] = self.chunk_size
        if stages:
            options["disable_recompute"] = True
        if self.state_v_first:
            options["state_v_first"] = True
        if self.is_gate_raw:
            options["use_gate_in_kernel"] = True
        if self.lower_bound is not None:
            options |= dict(lower_bound=self.lower_bound, safe_gate=True)
        if self.raw:
            options |= dict(
                use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True
            )
        return options


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


RAGGED = (0, 70, 70, 71, 135, 140, 140, 177, 177)  # and padding behind
ALIGNED = (0, 64, 64, 128, 128, 128, 192, 192, 192)
SHORT = (0, 1, 3, 6, 23, 39, 56, 60, 69)
PACKED = dict(B=1, T=192)
A, A_BIAS = ("A_log",), ("A_log", "dt_bias")

CATALOGUE = {
    case.name: case
    for case in [
        Case("dense", "two whole chunks and a short one; two value heads a key head; states in and out"),
        *(
            Case(regime, why, regime)
            for regime, why in REGIMES.items()
            if regime != "logsigmoid"
        ),
        Case("large_state", "an initial state of 1000: what is written drowns in it", state=1e3),
        Case("no_state", "no states in or out; every token in a whole chunk", T=128, state=None),
        Case("one_token", "T=1: a chunk of one row", B=4, T=1),
        Case("one_over", "the last chunk has one token; one value head a key head", T=65, H=3, HV=3),
        Case("odd", "odd K, V, H and T, three value heads a key head, a scale of its own",
             T=77, H=3, HV=9, K=33, V=7, scale=0.7),
        Case("state_v_first", "states are [V, K], K narrower than V", K=16, V=48, state_v_first=True),
        Case("chunk_16", "chunks of 16", chunk_size=16),
        Case("chunk_32", "chunks of 32", chunk_size=32),
        Case("chunk_128", "chunks of 128", chunk_size=128),
        Case("long", "33 chunks, weak gates: what the state gathers", "weak", B=1, T=2100, H=1, HV=1, V=32),
        Case("layer", "the head of a Kimi-Linear layer: K = V = 128", B=1, T=200, HV=2, K=128, V=128),
        Case("packed", "ragged tails, an empty sequence, one token, a last one empty, padding",
             cu_seqlens=RAGGED, **PACKED),
        Case("packed_aligned", "sequences end where chunks end: the state must not go on",
             "weak", cu_seqlens=ALIGNED, **PACKED),
        Case("packed_short", "eight sequences that one chunk could hold", "weak", cu_seqlens=SHORT, **PACKED),
        Case("packed_masks", "the masks of training packs", "masks", cu_seqlens=RAGGED, **PACKED),
        Case("packed_no_state", "packed, no states in or out", state=None, cu_seqlens=RAGGED, **PACKED),
        Case("softplus", "a raw gate, -exp(A_log) softplus(g + dt_bias), packed: not 0 past an end",
             gate=A_BIAS, cu_seqlens=RAGGED, **PACKED),
        Case("softplus_A", "the same without a bias", gate=A),
        Case("sigmoid", "a raw gate, -5 sigmoid(exp(A_log) (g + dt_bias))", gate=A_BIAS, lower_bound=-5.0),
        Case("raw", "everything raw: l2norm (zero keys too), gate, 2 sigmoid(beta)", gate=A_BIAS, raw=True),
    ]
}  # fmt: skip


def select(patterns=None):
    """The cases whose names match: comma-separated shell patterns, "!" before one leaves its matches out.

    None is all; a sequence of `Case`s is itself. Nothing matched is a ValueError.
    """
    if patterns is None:
        return list(CATALOGUE.values())
    if not isinstance(patterns, str):
        return list(patterns)
    parts = [part.strip() for part in patterns.split(",")]
    wanted = [part for part in parts if not part.startswith("!")] or ["*"]
    unwanted = [part[1:] for part in parts if part.startswith("!")]
    cases = [
        case
        for name, case in CATALOGUE.items()
        if any(fnmatch.fnmatchcase(name, part) for part in wanted)
        and not any(fnmatch.fnmatchcase(name, part) for part in unwanted)
    ]
    if not cases:
        raise ValueError(f"cases: expected a pattern of {', '.join(CATALOGUE)}, got {patterns!r}")
    return cases
