"""Faulty backwards for the conformance kit: our own stages, chained by hand, with one fault at one point.

A fault is a function that changes `m`, the tensors of the call by name, behind the stage that it is a fault
of, or before it. `cases` are the names of the catalogue that show it.
"""

from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np

import tops.cpu.kda as kda

C = 64  # the chunk size of the cases below
BETWEEN = ("dAqk", "dv_of_o", "dv_new", "dh", "dq_wy", "dk_wy", "dbeta_wy", "dG_wy", "dAkk", "dG")
RETURNED = ("dq", "dk", "dv", "db", "dg", "dh0", "dA", "dbias", *BETWEEN)


class Fault(NamedTuple):
    stage: str
    change: object
    cases: str = "dense,weak"


def kernel(fault=None, storage_dtype=None):
    """A candidate in `chunk_kda_bwd`'s convention with a fault in it, or none."""

    def op(*, q, do, dht, **inputs):
        m = SimpleNamespace(
            q=q, do=do, dht=dht, **{name: writable(x) for name, x in inputs.items()}, dA=None, dbias=None
        )
        pipeline(m, storage_dtype, lambda stage: fault and fault.stage == stage and fault.change(m))
        return {name: getattr(m, name) for name in RETURNED}

    return op


def pipeline(m, storage_dtype, change):
    """The stages backwards, `change` called before and behind each."""
    m.stored, m.cu_seqlens = dict(storage_dtype=storage_dtype), getattr(m, "cu_seqlens", None)
    m.chunks = dict(cu_seqlens=m.cu_seqlens, chunk_size=m.chunk_size)
    change("5 output, before")
    dAqk, dv = kda.chunk_kda_bwd_dAv(m.q, m.k, m.v_new, m.do, m.Aqk, m.scale, **m.chunks, **m.stored)
    m.dAqk, m.dv_of_o = writable(dAqk), writable(dv)
    change("5 output")
    m.gk, m.w_in, m.scale_in, m.packing = m.g, m.w, m.scale, m.chunks
    change("6 state, before")
    dh, dh0, dv_new = kda.chunk_gated_delta_rule_bwd_dhu(
        m.qg, m.kg, m.w_in, m.do, m.dv_of_o, gk=m.gk, h0=m.initial_state, dht=m.dht,
        scale=m.scale_in, **m.packing, **m.stored,
    )  # fmt: skip
    m.dh, m.dh0, m.dv_new = writable(dh), writable(dh0), writable(dv_new)
    change("6 state")
    m.h_in, m.v_new_in, m.dv_in, m.beta_in, m.scale_in = m.h, m.v_new, m.dv_new, m.beta, m.scale
    change("7 WY, before")
    made = kda.chunk_kda_bwd_wy_dqkg_fused(
        m.q, m.k, m.v, m.v_new_in, m.g, m.beta_in, m.Akk, m.h_in, m.do, m.dh, m.dv_in, m.scale_in,
        **m.chunks, **m.stored,
    )  # fmt: skip
    m.dq_wy, m.dk_wy, m.dv, m.dbeta_wy, m.dG_wy, m.dAkk = map(writable, made)
    change("7 WY")
    m.dAqk_in, m.dAkk_in = m.dAqk, m.dAkk
    change("8 intra, before")
    ends = m.dq_wy, m.dk_wy, m.dbeta_wy, m.dG_wy
    made = kda.chunk_kda_bwd_intra(m.q, m.k, m.g, m.beta, m.dAqk_in, m.dAkk_in, *ends, **m.chunks)
    m.dq, m.dk, m.db, m.dG = map(writable, made)
    change("8 intra, heads")
    m.dq, m.dk = (x.reshape(*m.q.shape[:3], -1, m.q.shape[3]).sum(3) for x in (m.dq, m.dk))
    m.dg = writable(kda.chunk_local_cumsum(m.dG, C, True, cu_seqlens=m.cu_seqlens))
    change("8 intra")
    if getattr(m, "use_gate_in_kernel", False):
        m.dyg, m.bound = m.dg, getattr(m, "lower_bound", None)
        made = kda.kda_gate_bwd(m.g_org, m.A_log, m.dt_bias, m.dyg, m.bound)
        m.dg, m.dA, m.dbias = map(writable, made)
        change("9 gate")


def writable(x):
    return np.array(x) if hasattr(x, "shape") and np.ndim(x) else x


FAULTS = {}


def fault(stage, cases="dense,weak"):
    def register(change):
        FAULTS[change.__name__] = Fault(stage, change, cases)
        return change

    return register


def by_chunk(x):
    """Views of the chunks of x [B, T, ...]."""
    return [x[:, first : first + C] for first in range(0, x.shape[1], C)]


# Stage 4, o.


@fault("5 output")
def dAqk_without_scale(m):
    m.dAqk /= np.float32(m.scale)


@fault("5 output")
def dAqk_scaled_twice(m):
    m.dAqk *= np.float32(m.scale)


@fault("5 output")
def dAqk_without_its_diagonal(m):
    for chunk in by_chunk(m.dAqk):
        for i in range(chunk.shape[1]):
            chunk[:, i, :, i] = 0


@fault("5 output, before", "weak")
def dAqk_of_u(m):
    m.v_new = m.u


@fault("5 output")
def dAqk_last_row_stale(m):
    m.dAqk[:, -1] = m.dAqk[:, -2]


@fault("5 output")
def dv_scaled_twice(m):
    m.dv_of_o = (m.dv_of_o * np.float32(m.scale)).astype(m.dv_of_o.dtype)


@fault("5 output")
def do_of_the_other_head(m):
    m.dv_of_o[:, :, [0, 1]] = m.dv_of_o[:, :, [1, 0]]


# Stage 3, the state.


@fault("6 state, before", "weak")
def dht_ignored(m):
    m.dht = None


@fault("6 state", "weak")
def dh_a_chunk_late(m):
    m.dh[:, :-1] = m.dh[:, 1:].copy()


@fault("6 state", "weak")
def d_initial_state_a_chunk_early(m):
    m.dh0 = m.dh[:, 0].astype(np.float32)


@fault("6 state", "weak")
def dv_new_without_dh(m):
    m.dv_new = m.dv_of_o


@fault("6 state, before", "weak")
def dh_without_w(m):
    m.w_in = np.zeros_like(m.w)


@fault("6 state, before")
def dh_without_scale(m):
    m.scale_in = 1.0


@fault("6 state, before", "uneven")
def dh_decay_of_the_row_before(m):
    m.gk = m.g.copy()
    for chunk in by_chunk(m.gk):
        chunk[:, -1] = chunk[:, -2]


@fault("6 state", "weak")
def d_initial_state_turned(m):
    m.dh0 = m.dh0.swapaxes(-1, -2)


@fault("6 state, before", "packed_aligned")
def dh_across_a_sequence_boundary(m):
    m.packing = dict(cu_seqlens=np.array(8 * [0] + [192]), chunk_size=C)
    m.dht = np.concatenate([m.dht[:-2], m.dht[-1:], m.dht[-3:-2]])


@fault("6 state, before", "packed")
def dht_of_the_next_sequence(m):
    m.dht = np.roll(m.dht, 1, axis=0)


@fault("6 state", "packed")
def d_initial_state_of_an_empty_sequence_zero(m):
    m.dh0[np.diff(m.cu_seqlens) == 0] = 0


# Stage 2, w and u.


@fault("7 WY")
def dv_without_beta(m):
    m.dv = (m.dv.astype(np.float32) / m.beta[..., None]).astype(m.dv.dtype)


@fault("7 WY", "beta_0_1")
def db_by_a_quotient(m):
    m.dbeta_wy = np.where(m.beta == 0, 0, m.dbeta_wy)


@fault("7 WY, before", "weak")
def dk_without_kg(m):
    m.v_new_in = np.zeros_like(m.v_new)


@fault("7 WY, before")
def dq_without_scale(m):
    m.scale_in = 1.0


@fault("7 WY", "weak")
def dG_without_the_decay_of_the_state(m):
    for i, (chunk, g) in enumerate(zip(by_chunk(m.dG_wy), by_chunk(m.g), strict=True)):
        of_state = np.einsum("bhkv,bhkv->bhk", np.float32(m.h[:, i]), np.float32(m.dh[:, i]))
        chunk[:, -1] -= np.exp2(g[:, -1]) * of_state


@fault("7 WY")
def dAkk_with_the_other_sign(m):
    m.dAkk = -m.dAkk


@fault("7 WY")
def dAkk_last_row_zero(m):
    m.dAkk[:, -1] = 0


@fault("7 WY, before", "weak")
def h_of_the_chunk_behind(m):
    m.h_in = np.concatenate([m.h[:, 1:], m.h[:, -1:]], axis=1)


@fault("7 WY, before", "weak")
def dv_new_as_of_o(m):
    m.dv_in = m.dv_of_o


@fault("7 WY, before")
def beta_twice(m):
    m.beta_in = m.beta**2


@fault("7 WY", "converged")
def residual_in_16_bits(m):
    """beta's gradient is that of v - k_in S, which is little where the state answers v."""
    G = np.concatenate([np.exp2(g) for g in by_chunk(m.g)], axis=1)
    k_in = np.repeat(m.k, 2, axis=2).astype(np.float32) * G
    S = np.concatenate([np.repeat(m.h[:, i : i + 1], x.shape[1], 1) for i, x in enumerate(by_chunk(m.g))], 1)
    k_in_S = np.einsum("bthk,bthkv->bthv", k_in, np.float32(S))
    exact, rounded = (m.v - k_in_S).astype(np.float32), m.v.astype(np.float32) - round_16(k_in_S)
    m.dbeta_wy += ((rounded - exact) * m.dv.astype(np.float32)).sum(-1) / m.beta


def round_16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


# Stage 1, the scores, and what is summed behind it.


@fault("8 intra, before")
def without_dAkk(m):
    m.dAkk_in = np.zeros_like(m.dAkk)


@fault("8 intra, before")
def without_dAqk(m):
    m.dAqk_in = np.zeros_like(m.dAqk)


@fault("8 intra, heads")
def db_without_the_scores(m):
    m.db = m.dbeta_wy


@fault("8 intra, heads")
def dG_without_the_scores(m):
    m.dG = m.dG_wy


@fault("8 intra, heads")
def dk_of_keys_alone(m):
    m.dk[:, 1::2] = m.dk_wy[:, 1::2]


@fault("8 intra, before")
def scores_behind_the_diagonal(m):
    m.dAqk_in = m.dAqk.copy()
    for chunk in by_chunk(m.dAqk_in):
        for i in range(chunk.shape[1]):
            chunk[:, i, :, i] = 0


@fault("8 intra")
def heads_averaged(m):
    m.dq, m.dk = m.dq / 2, m.dk / 2


@fault("8 intra, heads")
def the_first_head_of_a_group_alone(m):
    m.dq[:, :, 1::2] = 0


@fault("8 intra")
def dg_exclusive(m):
    m.dg = m.dg - m.dG


@fault("8 intra")
def dg_summed_forwards(m):
    m.dg = np.concatenate([x.cumsum(1) for x in by_chunk(m.dG)], axis=1)


@fault("8 intra")
def dg_in_log2(m):
    m.dg = m.dg * np.float32(np.log(2))


@fault("8 intra", "weak")
def dg_sum_runs_on(m):
    m.dg = np.flip(np.flip(m.dG, 1).cumsum(1), 1)


@fault("8 intra")
def dq_last_token_stale(m):
    m.dq[:, -1] = m.dq[:, -2]


@fault("8 intra", "packed")
def dk_last_token_of_a_sequence_missing(m):
    m.dk[:, m.cu_seqlens[5] - 1] = 0


@fault("8 intra")
def dk_not_finite_once(m):
    m.dk[1, 70, 1, 3] = np.inf


# The gate.


@fault("9 gate", "sigmoid_batch")
def dA_of_one_row_of_the_batch(m):
    m.dA = writable(kda.kda_gate_bwd(m.g_org[:1], m.A_log, m.dt_bias, m.dyg[:1], m.bound)[1])


@fault("9 gate", "sigmoid_batch")
def dbias_of_one_row_of_the_batch(m):
    m.dbias = writable(kda.kda_gate_bwd(m.g_org[:1], m.A_log, m.dt_bias, m.dyg[:1], m.bound)[2])


@fault("9 gate", "sigmoid_batch")
def dA_of_its_exponential(m):
    m.dA = m.dA / np.exp(m.A_log)


@fault("9 gate", "sigmoid_batch")
def dbias_with_the_other_sign(m):
    m.dbias = -m.dbias


@fault("9 gate", "sigmoid_batch")
def dg_without_A(m):
    m.dg = m.dg / np.exp(m.A_log)[:, None]


@fault("9 gate", "sigmoid_batch")
def dA_of_the_other_head(m):
    m.dA = m.dA[[1, 0, 2, 3]]
