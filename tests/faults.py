"""Faulty kernels for the conformance kit: our own stages, chained by hand, with one fault at one point.

A fault is a function that changes `m`, the tensors of the call by name, where it belongs: before the stages
("inputs"), or behind the stage that it is a fault of. `CASES` are the names of the catalogue that show it.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np

import tops.cpu.kda as kda

FIELDS = ("g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new", "h", "final_state", "o")
C, TAIL = 64, 128  # the chunk size, and the first token of the last, short chunk of the dense cases


class Fault(NamedTuple):
    stage: str
    change: object
    cases: str = "dense,weak"


def kernel(fault, storage_dtype):
    """A candidate in `chunk_kda_fwd`'s convention with a fault in it."""

    @functools.wraps(kda.chunk_kda_fwd)
    def op(**inputs):
        m = SimpleNamespace(**inputs, storage=storage_dtype)
        change = {fault.stage: fault.change}.get
        pipeline(m, lambda stage: change(stage, lambda m: None)(m))
        return {name: getattr(m, name) for name in FIELDS}

    return op


def pipeline(m, change):
    """The four stages, `change` called behind each."""
    stored = dict(storage_dtype=m.storage)
    m.gk = writable(kda.chunk_local_cumsum(m.g, C, scale=1 / np.log(2)))
    change("0 gate")
    intra(m)
    m.q_out, m.gk_out = m.q, m.gk  # what stage 4 makes qg of
    change("1 intra")
    if m.w is None:
        wy(m)
    change("2 WY")
    m.kg_in, m.gk_in, m.S_in, m.w_in = m.kg, m.gk, m.initial_state, m.w
    change("3 state, before")
    h, v_new, final_state = kda.chunk_gated_delta_rule_fwd_h(
        m.kg_in, m.w_in, m.u, gk=m.gk_in, initial_state=m.S_in, output_final_state=True, **stored
    )
    m.h, m.v_new, m.final_state = map(writable, (h, v_new, final_state))
    change("3 state")
    m.h_in, m.Aqk_in, m.scale_in = m.h, m.Aqk, m.scale
    change("4 output, before")
    o = kda.chunk_gla_fwd_o_gk(m.q_out, m.v_new, m.gk_out, m.Aqk_in, m.h_in, m.scale_in, **stored)
    m.o = writable(o)
    change("4 output")
    m.g = m.gk


def intra(m, **changed):
    of = dict(q=m.q, k=m.k, v=m.v, gk=m.gk, beta=m.beta) | changed
    made = kda.chunk_kda_fwd_intra(**of, scale=m.scale, disable_recompute=True, storage_dtype=m.storage)
    m.w, m.u, m.qg, m.kg, m.Aqk, m.Akk = map(writable, made)


def wy(m, **changed):
    of = dict(k=m.k, v=m.v, beta=m.beta, A=m.Akk, gk=m.gk, q=m.q) | changed
    m.w, m.u, m.qg, m.kg = map(writable, kda.recompute_w_u_fwd(**of, storage_dtype=m.storage))


def writable(x):
    return np.array(x)


FAULTS = {}


def fault(stage, cases="dense,weak"):
    def register(change):
        FAULTS[change.__name__] = Fault(stage, change, cases)
        return change

    return register


def by_chunk(x):
    """Views of the chunks of x [B, T, ...]."""
    return [x[:, first : first + C] for first in range(0, x.shape[1], C)]


# The gate.


@fault("0 gate")
def gate_in_nats(m):
    m.gk *= np.float32(np.log(2))


@fault("0 gate")
def gate_prefix_exclusive(m):
    for chunk in by_chunk(m.gk):
        chunk[:, 1:] = chunk[:, :-1].copy()
        chunk[:, 0] = 0


@fault("0 gate")
def gate_sum_runs_on(m):
    for previous, chunk in zip(by_chunk(m.gk), by_chunk(m.gk)[1:], strict=False):
        chunk += previous[:, -1:]


@fault("0 gate")
def gate_of_the_other_head(m):
    m.gk[:, :, [2, 3]] = m.gk[:, :, [3, 2]]


@fault("0 gate")
def gate_of_the_last_row_stale(m):
    m.gk[:, -1] = m.gk[:, -2]


@fault("0 gate")
def gate_in_bfloat16(m):
    m.gk = m.gk.astype(ml_dtypes.bfloat16).astype(np.float32)


# Stage 1. Behind a change of Akk, stage 2 is made again from it.


@fault("1 intra")
def Aqk_without_scale(m):
    m.Aqk = (m.Aqk.astype(np.float32) / np.float32(m.scale)).astype(m.Aqk.dtype)


@fault("1 intra")
def Aqk_without_diagonal(m):
    for chunk in by_chunk(m.Aqk):
        for i in range(chunk.shape[1]):
            chunk[:, i, :, i] = 0


@fault("1 intra")
def Aqk_block_lost(m):
    m.Aqk[:, C + 16 : C + 32, :, :16] = 0


@fault("1 intra")
def Aqk_last_row_of_one_head(m):
    m.Aqk[1, -1, 3] = m.Aqk[1, -2, 3]


@fault("1 intra")
def Akk_sign(m):
    for chunk in by_chunk(m.Akk):
        eye = np.eye(C, dtype=np.float32)[: chunk.shape[1], None]
        chunk[:] = (2 * eye - chunk.astype(np.float32)).astype(chunk.dtype)
    m.w = None


@fault("1 intra")
def Akk_without_beta(m):
    Aqk, beta = m.Aqk, m.beta
    intra(m, beta=np.ones_like(beta))
    m.Aqk, m.w = Aqk, None


@fault("1 intra")
def Akk_beta_of_the_column(m):
    for chunk, beta in zip(by_chunk(m.Akk), by_chunk(m.beta), strict=True):
        n = chunk.shape[1]
        columns = beta.swapaxes(1, 2)[:, None]  # [B, 1, HV, n]
        chunk[..., :n] = (chunk[..., :n].astype(np.float32) * columns / beta[..., None]).astype(chunk.dtype)
    m.w = None


@fault("1 intra")
def Akk_last_row_not_inverted(m):
    n = m.Akk.shape[1] - TAIL - 1
    m.Akk[0, -1, 2] = np.eye(C)[n]
    m.w = None


@fault("1 intra")
def heads_modulo(m):
    kept = {name: getattr(m, name) for name in ("Aqk", "Akk", "w", "u", "qg", "kg")}
    intra(m, q=m.q[:, :, ::-1], k=m.k[:, :, ::-1])
    for name, x in kept.items():  # h % 2 is h // 2 but for heads 1 and 2
        getattr(m, name)[:, :, [0, 3]] = x[:, :, [0, 3]]


@fault("1 intra")
def q_and_k_in_turn(m):
    kept = m.Akk, m.w, m.u, m.qg, m.kg
    intra(m, q=m.k, k=m.q)
    m.Akk, m.w, m.u, m.qg, m.kg = kept


# Stage 2.


@fault("2 WY")
def w_without_beta(m):
    kept = m.u, m.qg, m.kg
    wy(m, beta=np.ones_like(m.beta))
    m.u, m.qg, m.kg = kept


@fault("2 WY")
def u_with_beta_twice(m):
    kept = m.w, m.qg, m.kg
    wy(m, beta=m.beta**2)
    m.w, m.qg, m.kg = kept


@fault("2 WY")
def kg_with_the_prefix(m):
    k = np.repeat(m.k.astype(np.float32), 2, axis=2)
    m.kg = (k * np.exp2(m.gk)).astype(m.kg.dtype)


@fault("2 WY")
def kg_without_decay(m):
    m.kg = np.repeat(m.k, 2, axis=2).astype(m.kg.dtype)


@fault("2 WY")
def qg_with_scale(m):
    m.qg = (m.qg.astype(np.float32) * np.float32(m.scale)).astype(m.qg.dtype)
    m.q_out = (m.q.astype(np.float32) * np.float32(m.scale)).astype(m.q.dtype)


@fault("2 WY", "dense")
def qg_prefix_exclusive(m):
    m.qg = (m.qg.astype(np.float32) * np.exp(-m.g)).astype(m.qg.dtype)
    m.gk_out = m.gk - m.g / np.float32(np.log(2))


@fault("2 WY")
def w_last_row_stale(m):
    m.w[:, -1] = m.w[:, -2]


@fault("2 WY")
def u_one_row_of_one_head(m):
    m.u[0, TAIL + 3, 1] = m.u[0, TAIL + 2, 1]


# Stage 3.


@fault("3 state, before")
def state_without_decay(m):
    m.gk_in = np.zeros_like(m.gk)


@fault("3 state, before", "uneven")
def state_decay_of_the_row_before(m):
    m.gk_in = m.gk.copy()
    for chunk in by_chunk(m.gk_in):
        chunk[:, -1] = chunk[:, -2]


@fault("3 state, before")
def v_new_plus_wS(m):
    m.w_in = -m.w


@fault("3 state, before")
def initial_state_ignored(m):
    m.S_in = np.zeros_like(m.S_in)


@fault("3 state, before")
def initial_state_of_the_other_head(m):
    m.S_in = np.ascontiguousarray(m.S_in[:, ::-1])


@fault("3 state, before")
def state_misses_the_last_token(m):
    m.kg_in = m.kg.copy()
    for chunk in by_chunk(m.kg_in):
        chunk[:, -1] = 0


@fault("3 state", "weak")
def h_behind_its_chunk(m):
    m.h[:, :-1] = m.h[:, 1:].copy()


@fault("3 state", "weak")
def final_state_a_chunk_early(m):
    m.final_state = m.h[:, -1].astype(np.float32)


@fault("3 state")
def final_state_turned(m):
    m.final_state = m.final_state.swapaxes(-1, -2)


@fault("3 state")
def final_state_in_bfloat16(m):
    m.final_state = m.final_state.astype(ml_dtypes.bfloat16)


# Stage 4.


@fault("4 output, before", "weak")
def o_without_the_state(m):
    m.h_in = np.zeros_like(m.h)


@fault("4 output, before", "weak")
def o_from_the_state_behind(m):
    m.h_in = np.concatenate([m.h[:, 1:], m.h[:, -1:]], axis=1)


@fault("4 output, before")
def o_without_the_chunk(m):
    m.Aqk_in = np.zeros_like(m.Aqk)


@fault("4 output, before")
def o_scaled_twice(m):
    m.scale_in = m.scale**2


@fault("4 output")
def o_last_row_stale(m):
    m.o[:, -1] = m.o[:, -2]


@fault("4 output")
def o_last_row_of_one_head_10_percent_off(m):
    m.o[0, -1, 3] = (1.1 * m.o[0, -1, 3].astype(np.float32)).astype(m.o.dtype)


@fault("4 output")
def o_last_channel_zero(m):
    m.o[0, C:TAIL, 0, -1] = 0


@fault("4 output")
def o_one_percent_small(m):
    m.o = (0.99 * m.o.astype(np.float32)).astype(m.o.dtype)


@fault("4 output")
def o_one_head_two_percent_off(m):
    m.o[:, :, 1] = (1.02 * m.o[:, :, 1].astype(np.float32)).astype(m.o.dtype)


@fault("4 output")
def o_not_finite_once(m):
    m.o[1, -1, 2, 5] = np.nan


@fault("4 output")
def o_heads_in_turn(m):
    m.o = m.o[:, :, [0, 2, 1, 3]]


@fault("4 output")
def o_in_another_dtype(m):
    m.o = m.o.astype(np.float16)


# Packing: the whole forward, given another packing, or with states of another sequence.


def packed_kernel(fault, storage_dtype):
    """A candidate in `chunk_kda_fwd`'s convention; `fault.change` wraps the forward."""

    @functools.wraps(kda.chunk_kda_fwd)
    def op(**inputs):
        def forward(**changed):
            made = kda.chunk_kda_fwd(**inputs | changed, storage_dtype=storage_dtype)
            return {name: writable(x) for name, x in made._asdict().items()}

        return fault.change(forward, **inputs)

    return op


PACKING_FAULTS = {}


def packing_fault(stage, cases):
    def register(change):
        PACKING_FAULTS[change.__name__] = Fault(stage, change, cases)
        return change

    return register


@packing_fault("0 gate", "packed")
def boundary_a_token_late(forward, cu_seqlens, **_):
    cu_seqlens = cu_seqlens.copy()
    cu_seqlens[1:3] += 1
    made = forward(cu_seqlens=cu_seqlens)
    return made


@packing_fault("3 state", "packed_aligned")
def state_not_reset(forward, cu_seqlens, **_):
    made, merged = forward(), forward(cu_seqlens=np.array([0] + 8 * [192]))
    for name in ("v_new", "o"):
        made[name] = merged[name]
    return made


@packing_fault("3 state", "packed")
def states_of_the_next_sequence(forward, initial_state, **_):
    return forward(initial_state=np.roll(initial_state, 1, axis=0))


@packing_fault("3 state", "packed")
def empty_sequence_loses_its_state(forward, cu_seqlens, **_):
    made = forward()
    made["final_state"][np.diff(cu_seqlens) == 0] = 0
    return made


@packing_fault("4 output", "packed")
def last_token_of_a_sequence_missing(forward, cu_seqlens, **_):
    made = forward()
    made["o"][:, cu_seqlens[5] - 1] = 0
    return made


@packing_fault("4 output", "packed")
def one_token_sequence_reads_its_neighbour(forward, cu_seqlens, **_):
    made = forward()
    made["o"][:, cu_seqlens[3] - 1] = made["o"][:, cu_seqlens[3]]
    return made
