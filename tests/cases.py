"""Random calls: their sizes and options come from a short list, which is compiled once; the rest is fresh."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from inputs import unit


class Signature(NamedTuple):
    """What a call is compiled for. N is 0 for a dense batch."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    chunk_size: int
    dtype: str = "float32"
    gate: str | None = None  # the in-kernel activations: "softplus" or "sigmoid", which has a lower bound
    state_v_first: bool = False


# Primes and ones; a chunk more or less than the sizes suggest; every dtype, chunk size and option.
SIGNATURES = [
    Signature(1, 130, 1, 2, 5, 3, N=4, chunk_size=64),
    Signature(2, 97, 2, 2, 7, 1, N=0, chunk_size=32),
    Signature(1, 131, 1, 1, 1, 11, N=5, chunk_size=16),
    Signature(1, 150, 2, 4, 16, 8, N=3, chunk_size=128, state_v_first=True),
    Signature(3, 1, 1, 3, 3, 2, N=0, chunk_size=64),
    Signature(1, 70, 1, 1, 13, 5, N=6, chunk_size=32, dtype="float64"),
    Signature(2, 129, 1, 2, 8, 4, N=0, chunk_size=64, dtype="float64", state_v_first=True),
    Signature(1, 101, 1, 2, 4, 7, N=4, chunk_size=64, dtype="bfloat16"),
    Signature(2, 67, 1, 1, 11, 3, N=0, chunk_size=16, dtype="bfloat16"),
    Signature(1, 90, 2, 2, 6, 5, N=3, chunk_size=32, dtype="float16"),
    Signature(1, 99, 1, 2, 8, 5, N=4, chunk_size=32, gate="softplus"),
    Signature(2, 70, 1, 1, 5, 6, N=0, chunk_size=64, gate="sigmoid"),
    Signature(1, 77, 2, 4, 3, 4, N=3, chunk_size=64, dtype="float64", gate="softplus"),
]
SINGLE = Signature(1, 113, 1, 2, 8, 5, N=1, chunk_size=32)  # one sequence, shorter than T

GATES = ("zero", "weak", "usual", "minus_5", "mask", "subnormal", "reset")
KEYS = ("random", "near", "equal", "some_zero")
BETAS = ("usual", "zero", "one", "two")
STATES = ("zero", "normal", "large")


@dataclass(frozen=True)
class Case:
    """One call. Every gate, key and beta is of one of the regimes named."""

    signature: Signature
    seed: int
    ends: tuple[int, ...] = ()  # cu_seqlens, or () for a dense batch
    gates: tuple[str, ...] = ("usual",)
    keys: str = "random"
    betas: tuple[str, ...] = ("usual",)
    state: str = "normal"

    @property
    def cu_seqlens(self):
        return np.array(self.ends, np.int32) if self.ends else None

    def draw(self):
        """(q, k, v, g, beta) and the initial states, raw where the signature activates them."""
        s, rng = self.signature, np.random.default_rng(self.seed)
        shape = (s.B, s.T, s.HV)
        q, k = (unit(rng.standard_normal((s.B, s.T, s.H, s.K))) for _ in range(2))
        v = rng.standard_normal((*shape, s.V))
        if self.keys == "near":
            k = unit(k[:, :1] + 0.05 * rng.standard_normal(k.shape))
        elif self.keys == "equal":
            k = np.broadcast_to(k[:, :1], k.shape)
        elif self.keys == "some_zero":
            k = k * (rng.random(k.shape[:3]) < 0.7)[..., None]
        g = -np.logaddexp(0, -rng.standard_normal((*shape, s.K)))
        g = choose(rng, g, self.gates, lambda gate: gate_values(gate, g, rng, s.dtype))
        beta = 1 / (1 + np.exp(-rng.standard_normal(shape)))
        values = dict(usual=beta, zero=0 * beta, one=0 * beta + 1, two=0 * beta + 2)
        beta = choose(rng, beta, self.betas, values.get)
        if s.gate:  # raw, for the activations to bring back to about the same
            q, k = 3 * q, 2 * k
            g, beta = np.clip(-g, -30, 30), 4 * beta - 2
        states = rng.standard_normal((s.N or s.B, s.HV, s.K, s.V))
        states *= dict(zero=0, normal=1, large=100)[self.state]
        arrays = (x.astype(s.dtype) for x in (q, k, v, g, beta))
        return tuple(arrays), states.astype("float64" if s.dtype == "float64" else "float32")

    def gate_options(self):
        """A_log [HV] and dt_bias [HV * K], in the dtype of the call."""
        rng = np.random.default_rng(self.seed + 1)
        s = self.signature
        return dict(
            A_log=(0.5 * rng.standard_normal(s.HV)).astype(s.dtype),
            dt_bias=rng.standard_normal(s.HV * s.K).astype(s.dtype),
        )

    def activated(self, q, k, v, g, beta):
        """What `draw` gives, in float64 and as the recurrence takes it."""
        q, k, v, g, beta = (x.astype(np.float64) for x in (q, k, v, g, beta))
        if not self.signature.gate:
            return q, k, v, g, beta
        A_log, dt_bias = (x.astype(np.float64) for x in self.gate_options().values())
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        g, a = g + dt_bias.reshape(g.shape[-2:]), np.exp(A_log)[:, None]
        g = -a * np.logaddexp(0, g) if self.signature.gate == "softplus" else -5 / (1 + np.exp(-a * g))
        return q, k, v, g, (2 if self.signature.gate == "sigmoid" else 1) / (1 + np.exp(-beta))


def choose(rng, x, regimes, values):
    """x with each element taken from one of the regimes, all alike likely."""
    which = rng.integers(len(regimes), size=x.shape)
    return np.choose(which, [np.broadcast_to(values(regime), x.shape) for regime in regimes])


def gate_values(gate, usual, rng, dtype):
    deepest = -744.0 if dtype == "float64" else -103.0  # exp of it is the least subnormal number
    return dict(
        zero=np.zeros_like(usual),
        weak=1e-3 * usual,
        usual=usual,
        minus_5=np.full_like(usual, -5),
        mask=np.full_like(usual, -1000),
        subnormal=rng.uniform(deepest, 0.85 * deepest, usual.shape),
        reset=np.full_like(usual, -np.inf),
    )[gate]


@st.composite
def packings(draw, s):
    """cu_seqlens of N sequences in T tokens: empty, of one token, long; with padding and without."""
    if s.N == 0:
        return ()
    end = st.one_of(st.integers(0, s.T), st.sampled_from([0, 1, s.chunk_size, s.T - 1, s.T]))
    return (0, *sorted(draw(st.lists(end.map(lambda x: min(x, s.T)), min_size=s.N, max_size=s.N))))


@st.composite
def cases(draw, signatures=SIGNATURES, gates=GATES):
    s = draw(st.sampled_from(signatures))

    def some(names):
        return draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple))

    return Case(
        signature=s,
        seed=draw(st.integers(0, 2**32 - 1)),
        ends=draw(packings(s)),
        gates=some(gates),
        keys=draw(st.sampled_from(KEYS)),
        betas=some(BETAS),
        state=draw(st.sampled_from(STATES)),
    )
