"""The catalogue: named inputs that a KDA kernel must get right, deterministic from (name, dtype, seed)."""

import dataclasses
import fnmatch
import itertools
import math
import zlib

import numpy as np

from ..checks import CHUNK_SIZES
from .regimes import FURTHER, REGIMES, draw
from .where import OF_CHUNKS, STATES

VERSION = 2  # of the catalogue: goes up when a name comes to mean other numbers
BITS = ("causality", "neighbours", "containment", "determinism")  # the checks of `bits`


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, whose numbers follow from its name. One that cannot be is a ValueError of one line."""

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
    state: float | None = 1.0  # size of the initial state's elements; None: no states in and out
    state_v_first: bool = False
    gate: tuple = ()  # which of A_log and dt_bias a raw gate comes with; none: g is a log decay
    lower_bound: float | None = None
    narrow: bool = False  # g and beta in q's dtype
    raw: bool = False  # q, k and beta come raw too: for `chunk_kda` alone, `chunk_kda_fwd` does not take them
    allow_neg_eigval: bool = True  # for raw: beta is 2 sigmoid(beta)
    bits: str | None = None  # a check of `bits`, in place of a comparison with the golden

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("B", "T", "H", "HV", "K", "V")}
        for name, size in sizes.items():
            self._require(type(size) is int and size >= 1, name, "an integer of at least 1")
        self._require(self.chunk_size in CHUNK_SIZES, "chunk_size", f"one of {CHUNK_SIZES}")
        self._require(self.HV % self.H == 0, "HV", f"a multiple of H={self.H}")
        known = ("logsigmoid", *REGIMES, *FURTHER)
        self._require(self.regime in known, "regime", f"one of {', '.join(known)}")
        for name in ("scale", "state", "lower_bound"):
            number = getattr(self, name)
            self._require(number is None or is_finite(number), name, "a number or None")
        if self.cu_seqlens is not None:
            self._check_packing()
        gates = isinstance(self.gate, tuple) and set(self.gate) <= {"A_log", "dt_bias"}
        self._require(gates, "gate", "a tuple of some of A_log, dt_bias")
        bounded = "A_log" in self.gate or not self.gate or self.lower_bound is not None
        self._require(bounded, "gate", "A_log unless lower_bound is given")
        has_state = self.state is not None or self.regime != "converged"
        self._require(has_state, "state", "a number, for v to answer")
        self._require(self.bits is None or self.bits in BITS, "bits", f"one of {', '.join(BITS)}")
        in_batch = self.bits == "neighbours" or (self.bits == "containment" and self.cu_seqlens is None)
        self._require(not in_batch or self.B > 1, "B", f"more than 1, for {self.bits}")

    def _check_packing(self):
        self._require(self.B == 1, "B", "1, which holds the packed sequences")
        ends = self.cu_seqlens
        whole = isinstance(ends, tuple) and len(ends) > 1 and all(type(end) is int for end in ends)
        rises = whole and ends[0] == 0 and all(a <= b for a, b in itertools.pairwise(ends))
        expected = f"a tuple of integers that rise from 0 to at most T={self.T}"
        self._require(rises and ends[-1] <= self.T, "cu_seqlens", expected)

    def _require(self, holds, name, expected):
        if not holds:
            raise ValueError(f"Case {self.name!r}: {name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def sequences(self):
        """[(row of the batch, first token, end)] of each sequence."""
        if self.cu_seqlens is None:
            return [(row, 0, self.T) for row in range(self.B)]
        return [(0, *span) for span in itertools.pairwise(self.cu_seqlens)]

    def inputs(self, dtype=np.float32, seed=0):
        """The arrays of the call by name, as NumPy's: q, k, v in `dtype`, the others in float32, or float64
        beside it, g and beta of a `narrow` case in `dtype` too; cu_seqlens int64."""
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
        if self.regime == "converged":
            arrays["v"] = self._answers(arrays) * (1 + 1e-3 * normal(rng, *arrays["v"].shape))
        narrow = ("q", "k", "v", "g", "beta") if self.narrow else ("q", "k", "v")
        arrays = {name: x.astype(dtype if name in narrow else wide) for name, x in arrays.items()}
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

    def _answers(self, arrays):
        """What the initial states, fading by the gates alone, answer to every key: [B, T, HV, V]."""
        k, g, S = (arrays[name].astype(np.float64) for name in ("k", "g", "initial_state"))
        k = np.repeat(k, self.HV // self.H, axis=2)
        S = S.swapaxes(-1, -2) if self.state_v_first else S
        v = arrays["v"].copy()
        for n, (row, start, end) in enumerate(self.sequences):
            faded = k[row, start:end] * np.exp(np.cumsum(g[row, start:end], axis=0))
            v[row, start:end] = np.sum(faded[..., None] * S[n], axis=-2)
        return v

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
            options |= dict(use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True)
        if self.raw and self.allow_neg_eigval:
            options["allow_neg_eigval"] = True
        return options


def is_finite(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


RAGGED = (0, 70, 70, 71, 135, 140, 140, 177, 177)  # and padding behind
FULL = (0, 70, 71, 135, 140, 150, 151, 177, 192)  # no sequence is empty, and no padding
ALIGNED = (0, 64, 64, 128, 128, 128, 192, 192, 192)
SHORT = (0, 1, 3, 6, 23, 39, 56, 60, 69)
PACKED = dict(B=1, T=192)
WIDE = dict(B=1, HV=2, K=128, V=128)
A, A_BIAS = ("A_log",), ("A_log", "dt_bias")

# A static shape is one compilation: cases share them.
CATALOGUE = {
    case.name: case
    for case in [
        Case("dense", "two whole chunks and a short one; two value heads a key head; states in and out"),
        *(
            Case(regime, why, regime)
            for regime, why in (REGIMES | FURTHER).items()
            if regime not in ("logsigmoid", "small_keys")
        ),
        Case("large_state", "an initial state of 1000: what is written drowns in it", state=1e3),
        Case("narrow", "g and beta in the dtype of q", narrow=True),
        Case("no_state", "no states in or out; every token in a whole chunk", T=128, state=None),
        Case("one_token", "T=1: a chunk of one row", B=4, T=1),
        Case("short", "T=37: less than a chunk", T=37),
        Case("one_over", "the last chunk has one token; one value head a key head", T=65, H=3, HV=3),
        Case("odd", "odd K, V, H and T, three value heads a key head, a scale of its own",
             T=77, H=3, HV=9, K=33, V=7, scale=0.7),
        *(
            Case(f"K_{K}", f"K of {K}: no power of two", "uneven", B=1, T=70, H=1, HV=2, K=K)
            for K in (96, 160, 192)
        ),
        Case("state_v_first", "states are [V, K], K narrower than V", K=16, V=48, state_v_first=True),
        Case("chunk_16", "chunks of 16; K = V: a turned state has the right shape", V=32, chunk_size=16),
        Case("chunk_32", "chunks of 32", chunk_size=32),
        Case("chunk_128", "chunks of 128; K = V", V=32, chunk_size=128),
        Case("long", "33 chunks, weak gates: what the state gathers", "weak", B=1, T=2100, H=1, HV=1, V=32),
        Case("layer", "the head of a Kimi-Linear layer, in whole chunks: K = V = 128", T=192, **WIDE),
        Case("packed", "ragged tails, an empty sequence, one token, a last one empty, padding",
             cu_seqlens=RAGGED, **PACKED),
        Case("packed_full", "ragged tails and one token, no sequence empty, no padding",
             "uneven", cu_seqlens=FULL, **PACKED),
        Case("packed_aligned", "sequences end where chunks end: the state must not go on",
             "weak", cu_seqlens=ALIGNED, **PACKED),
        Case("packed_short", "eight sequences that one chunk could hold", "weak", cu_seqlens=SHORT, **PACKED),
        Case("packed_masks", "the masks of training packs", "masks", cu_seqlens=FULL, **PACKED),
        Case("packed_no_state", "packed, no states in or out", state=None, cu_seqlens=RAGGED, **PACKED),
        Case("packed_state_v_first", "packed, states are [V, K], K = V",
             "uneven", V=32, state_v_first=True, cu_seqlens=FULL, **PACKED),
        Case("packed_layer", "packed, whole chunks, K = V = 128", "uneven",
             T=192, cu_seqlens=(0, 64, 192), **WIDE),
        Case("softplus", "a raw gate, -exp(A_log) softplus(g + dt_bias), packed: not 0 past an end",
             gate=A_BIAS, cu_seqlens=RAGGED, **PACKED),
        Case("softplus_A", "the same without a bias", gate=A),
        Case("sigmoid", "a raw gate, -5 sigmoid(exp(A_log) (g + dt_bias)), packed: not 0 past an end",
             gate=A_BIAS, lower_bound=-5.0, cu_seqlens=RAGGED, **PACKED),
        Case("sigmoid_batch", "the same in a batch, which the gradients of A_log and dt_bias are summed over",
             gate=A_BIAS, lower_bound=-5.0),
        Case("sigmoid_alone", "-5 sigmoid(g): neither A_log nor dt_bias", lower_bound=-5.0),
        Case("raw", "everything raw: l2norm (zero keys too), gate, 2 sigmoid(beta)", gate=A_BIAS, raw=True),
        Case("raw_beta", "l2norm and plain sigmoid(beta), g a log decay", raw=True, allow_neg_eigval=False),
        Case("raw_small_keys", FURTHER["small_keys"], "small_keys", raw=True, allow_neg_eigval=False),
        Case("packed_raw", "everything raw, the gate with a lower bound, packed", gate=A_BIAS, raw=True,
             lower_bound=-5.0, cu_seqlens=FULL, **PACKED),
        Case("causality", "to the bit: no output depends on a later token", bits="causality"),
        Case("neighbours", "to the bit: no batch row, no head on another", bits="neighbours"),
        Case("containment", "to the bit: NaN and inf stay in their batch row", bits="containment"),
        Case("packed_containment", "to the bit: NaN and inf stay in their sequence, and in the padding",
             bits="containment", cu_seqlens=RAGGED, **PACKED),
        Case("determinism", "to the bit: the same call twice", bits="determinism"),
    ]
}  # fmt: skip


def select(patterns=None):
    """The cases whose names match: comma-separated shell patterns, "!" before one leaves its matches out.

    None is all; a `Case` or a sequence of them is itself. Nothing matched is a ValueError.
    """
    if patterns is None:
        return list(CATALOGUE.values())
    if isinstance(patterns, Case):
        return [patterns]
    if not isinstance(patterns, str):
        cases = list(patterns)
        for case in cases:
            if not isinstance(case, Case):
                raise TypeError(f"cases: expected a pattern, a Case or Cases, got {case!r} among them")
        return cases
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
