"""Wrong KDA kernels that only one kind of input shows: each a right kernel of `right.py` but for one habit.

`MISSES` has for each the cases of the catalogue that must show it and the dtype of its inputs.
"""

from functools import wraps
from typing import NamedTuple

import ml_dtypes
import numpy as np
import right

BFLOAT16, FLOAT16, FLOAT32 = map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32))


class Miss(NamedTuple):
    kernel: object
    cases: str
    dtype: np.dtype = FLOAT32


MISSES = {}
chunked, by_token = right.kernel(), right.kernel(chunk=1)


def miss(cases, of=chunked, dtype=FLOAT32):
    """Registers a function of a right kernel and the arguments of a call."""

    def register(wrong):
        @wraps(wrong)
        @np.errstate(invalid="ignore")
        def kernel(**inputs):
            return wrong(of, **inputs)

        MISSES[wrong.__name__] = Miss(kernel, cases, dtype)
        return wrong

    return register


@miss("packed_layer")
def packed_128_reads_the_next_state(op, initial_state=None, cu_seqlens=None, **inputs):
    """As a kernel that takes nothing but K = V = 128: see `takes_128_alone`."""
    if cu_seqlens is not None and initial_state is not None:
        initial_state = np.roll(initial_state, 1, axis=0)
    return op(initial_state=initial_state, cu_seqlens=cu_seqlens, **inputs)


@miss("packed_containment")
def mask_by_multiplication(op, k, cu_seqlens=None, **inputs):
    """A chunk is loaded whole, and what lies behind its sequence's end is multiplied by 0."""
    o, final_state = op(k=k, cu_seqlens=cu_seqlens, **inputs)
    for n, end in enumerate(() if cu_seqlens is None else cu_seqlens[1:]):
        final_state[n] += 0 * k[0, end : end + 8].astype(np.float32).sum()
    return o, final_state


def from_the_end(g):
    """Sums of gates that are taken from the chunk's end and back: off by less than a rounding."""
    sums = right.in_order(g)
    return (sums - sums[..., -1:, :]) + sums[..., -1:, :]


MISSES["reads_later_gates"] = Miss(right.kernel(from_the_end), "causality")


@miss("containment")
def sums_over_the_batch(op, v, **inputs):
    """One row's NaN is every row's."""
    o, final_state = op(v=v, **inputs)
    return o + 0 * v.astype(np.float32).sum(), final_state


@miss("neighbours")
def quantised_by_all_heads(op, v, **inputs):
    """The rounding of a head follows from the largest value of all."""
    largest = np.float32(2**-20) * abs(v).max()
    o, final_state = op(v=v, **inputs)
    return (o + largest) - largest, final_state


@miss("determinism")
def another_order_every_time(op, q, **inputs):
    calls.append(None)
    return op(q=q * (1 + np.float32(2**-22) * (len(calls) % 2)), **inputs)


calls = []


@miss("short")
def not_a_number_below_a_chunk(op, q, **inputs):
    o, final_state = op(q=q, **inputs)
    return (o * np.nan if 1 < q.shape[1] < 64 else o), final_state


@miss("K_96,K_160,K_192")
def channels_of_the_last_tile_lost(op, q, k, **inputs):
    """K is taken in tiles of 64; of 96, 160 and 192 a power of two is left."""
    K = q.shape[-1]
    k = k.copy()
    k[..., 1 << (K.bit_length() - 1) :] = 0
    return op(q=q, k=k, **inputs)


@miss("sigmoid_alone")
def lower_bound_needs_A_log(op, A_log=None, lower_bound=None, **inputs):
    """Without A_log the gate is softplus'."""
    return op(A_log=A_log, lower_bound=None if A_log is None else lower_bound, **inputs)


def l2norm(normal):
    def wrong(op, q, k, use_qk_l2norm_in_kernel=False, **inputs):
        q, k = (normal(x.astype(np.float32)) for x in (q, k)) if use_qk_l2norm_in_kernel else (q, k)
        return op(q=q, k=k, **inputs)

    return wrong


def norm(x):
    return np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


MISSES["l2norm_epsilon_as_a_floor"] = Miss(
    lambda **inputs: l2norm(lambda x: x / np.maximum(norm(x), np.float32(1e-6)))(chunked, **inputs),
    "raw_small_keys",
)
MISSES["l2norm_epsilon_outside_the_root"] = Miss(
    lambda **inputs: l2norm(lambda x: x / (norm(x) + np.float32(1e-6)))(chunked, **inputs), "raw_small_keys"
)


def clamped(g):
    """Sums in log2, no less than what a float32 has an exponent for: of 16 safe gates they are none."""
    return np.maximum(right.in_order(g), np.float32(-126))


MISSES["exponents_clamped"] = Miss(right.kernel(clamped, chunk=16), "strong")


@miss("chunk_16,chunk_128,layer,packed_layer")
def square_states_turned(op, initial_state=None, **inputs):
    if initial_state is not None and initial_state.shape[-1] == initial_state.shape[-2]:
        initial_state = initial_state.swapaxes(-1, -2)
    return op(initial_state=initial_state, **inputs)


for dtype in (BFLOAT16, FLOAT16):
    MISSES[f"state_by_token_in_{dtype}"] = Miss(right.kernel(chunk=1, state_dtype=dtype), "converged", dtype)
    MISSES[f"state_by_chunk_in_{dtype}"] = Miss(right.kernel(state_dtype=dtype), "converged", dtype)


def beta_in_bfloat16(op, beta, **inputs):
    return op(beta=beta.astype(BFLOAT16).astype(np.float32), **inputs)


# For a candidate in bfloat16 it is no more than what kernels round that store bfloat16.
for dtype in (FLOAT32, FLOAT16):
    MISSES[f"beta_in_bfloat16_in_{dtype}"] = Miss(
        lambda **inputs: beta_in_bfloat16(by_token, **inputs), "dense,weak", dtype
    )


def takes_128_alone(*, q, v, **inputs):
    if (q.shape[-1], v.shape[-1]) != (128, 128):
        raise NotImplementedError
    return chunked(q=q, v=v, **inputs)
