"""Bad input is refused in one line that names the argument, what was expected, and what came."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fla_calls import BY_POSITION

import tops.cpu.kda
from tops.cpu.kda import (
    chunk_gated_delta_rule_bwd_dhu,
    chunk_gated_delta_rule_fwd_h,
    chunk_gla_fwd_o_gk,
    chunk_kda,
    chunk_kda_bwd,
    chunk_kda_bwd_dAv,
    chunk_kda_bwd_intra,
    chunk_kda_bwd_wy_dqkg_fused,
    chunk_kda_fwd,
    chunk_kda_fwd_intra,
    chunk_local_cumsum,
    context_parallel_kda,
    fused_kda_gate,
    fused_recurrent_kda,
    fused_recurrent_kda_fwd,
    kda_gate_bwd,
    kda_gate_chunk_cumsum,
    kda_gate_fwd,
    naive_chunk_kda,
    naive_kda_gate,
    naive_kda_lowerbound_gate,
    naive_recurrent_kda,
    prepare_chunk_indices,
    prepare_chunk_offsets,
    prepare_lens,
    recompute_w_u_fwd,
)

pytestmark = pytest.mark.unoptimized
B, T, H, HV, K, V = 1, 8, 2, 4, 3, 5


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = dict(
    q=zeros(B, T, H, K), k=zeros(B, T, H, K), v=zeros(B, T, HV, V), g=zeros(B, T, HV, K), beta=zeros(B, T, HV)
)
TWICE = {name: np.concatenate([x, x]) for name, x in GOOD.items()}
CU = np.array([0, 3, 8])
FLOATS = "an array of float64, float32, bfloat16, float16"
INTEGERS = "an array of int32, int64"
HEAD_FIRST = "; are the heads before the tokens?"
NOT_FROM_0 = (
    "expected a first entry of 0, got 1; give the padding before it a sequence of its own: [0, 1, ...]"
)

EVERYWHERE = [
    (dict(q=zeros(T, H, K)), ValueError, "q: expected a shape [B, T, H, K], got (8, 2, 3)"),
    (
        {name: x[:, :0] for name, x in GOOD.items()},
        ValueError,
        "q: expected [B, T, H, K] with each of at least 1, got (1, 0, 2, 3)",
    ),
    (dict(k=zeros(B, T, H, 4)), ValueError, "k: expected [B, T, H, K] = (1, 8, 2, 3), got (1, 8, 2, 4)"),
    (dict(v=zeros(T, HV, V)), ValueError, "v: expected a shape [B, T, HV, V], got (8, 4, 5)"),
    (dict(v=zeros(B, 7, HV, V)), ValueError, "v: expected [B, T, HV, V] = (1, 8, HV, V), got (1, 7, 4, 5)"),
    (
        dict(v=zeros(B, T, HV, 0)),
        ValueError,
        "v: expected [B, T, HV, V] with each of at least 1, got (1, 8, 4, 0)",
    ),
    (
        dict(v=zeros(B, T, 3, V)),
        ValueError,
        "v: expected HV a multiple of H=2, got HV=3",
    ),
    (dict(g=zeros(B, T, H, K)), ValueError, "g: expected [B, T, HV, K] = (1, 8, 4, 3), got (1, 8, 2, 3)"),
    (dict(beta=zeros(B, T, H)), ValueError, "beta: expected [B, T, HV] = (1, 8, 4), got (1, 8, 2)"),
    (dict(q=[[1.0]]), TypeError, f"q: expected {FLOATS}, got list"),
    (dict(v=zeros(B, T, HV, V, dtype=int)), TypeError, f"v: expected {FLOATS}, got an array of int64"),
    (
        dict(beta=zeros(B, T, HV, dtype=np.complex64)),
        TypeError,
        f"beta: expected {FLOATS}, got an array of complex64",
    ),
    (dict(k=zeros(B, T, H, K, dtype=np.float16)), TypeError, "k: expected q's dtype float32, got float16"),
    (
        dict(v=zeros(B, T, HV, V, dtype=np.float64)),
        TypeError,
        "v: expected at most float32, as q is float32, got float64",
    ),
    *(
        ({name: GOOD[name].swapaxes(1, 2)}, ValueError, f"{name}: expected {expected}{HEAD_FIRST}")
        for name, expected in dict(
            k="[B, T, H, K] = (1, 8, 2, 3), got (1, 2, 8, 3)",
            v="[B, T, HV, V] = (1, 8, HV, V), got (1, 4, 8, 5)",
            beta="[B, T, HV] = (1, 8, 4), got (1, 4, 8)",
        ).items()
    ),
    (
        {name: x.swapaxes(1, 2) for name, x in GOOD.items()},
        ValueError,
        f"v: expected [B, T, HV, V] = (1, 2, HV, V), got (1, 4, 8, 5){HEAD_FIRST}",
    ),
    (
        {name: zeros(B, H, T, K) for name in "qkvg"}
        | dict(beta=zeros(B, H, T), initial_state=zeros(B, H, K, K)),
        ValueError,
        f"initial_state: expected [N, HV, K, V] = (1, 8, 3, 3), got (1, 2, 3, 3){HEAD_FIRST}",
    ),
    (
        dict(g=zeros(B, T, HV, K, dtype=np.float64)),
        TypeError,
        "g: expected at most float32, as q is float32, got float64",
    ),
    (dict(scale="1"), TypeError, "scale: expected a number, got str"),
    (dict(scale=True), TypeError, "scale: expected a number, got bool"),
    (dict(scale=np.ones(1)), TypeError, "scale: expected a number, got an array of float64"),
    (dict(scale=np.array(True)), TypeError, "scale: expected a number, got bool"),
    (dict(scale=np.array(np.nan)), ValueError, "scale: expected a finite number, got nan"),
    (dict(scale=10**400), ValueError, "scale: expected a finite number, got inf"),
    (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    (
        dict(initial_state=zeros(B, HV, V, K)),
        ValueError,
        "initial_state: expected [N, HV, K, V] = (1, 4, 3, 5), got (1, 4, 5, 3)",
    ),
    (
        dict(initial_state=zeros(B, HV, K, V), cu_seqlens=CU),
        ValueError,
        "initial_state: expected [N, HV, K, V] = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    (
        dict(initial_state=zeros(B, HV, K, V, dtype=np.float64)),
        TypeError,
        "initial_state: expected at most float32, as q is float32, got float64",
    ),
    (dict(cu_seqlens=[0, 8.0]), TypeError, f"cu_seqlens: expected {INTEGERS}, got list"),
    (dict(cu_seqlens=[0, 2**80]), TypeError, f"cu_seqlens: expected {INTEGERS}, got an array of object"),
    (dict(cu_seqlens=(0, 8)), TypeError, f"cu_seqlens: expected {INTEGERS}, got tuple"),
    (
        dict(cu_seqlens=np.array([0.0, 8.0])),
        TypeError,
        f"cu_seqlens: expected {INTEGERS}, got an array of float64",
    ),
    (
        dict(cu_seqlens=np.array([0, 5, 4], np.uint32)),
        TypeError,
        f"cu_seqlens: expected {INTEGERS}, got an array of uint32",
    ),
    (
        dict(cu_seqlens=np.array([[0, 8]])),
        ValueError,
        "cu_seqlens: expected a shape [N + 1] with N of at least 1, got (1, 2)",
    ),
    (
        dict(cu_seqlens=np.array([0])),
        ValueError,
        "cu_seqlens: expected a shape [N + 1] with N of at least 1, got (1,)",
    ),
    (
        dict(**TWICE, cu_seqlens=CU),
        ValueError,
        "cu_seqlens: expected a batch of B=1 that holds the packed sequences, got B=2",
    ),
    (dict(cu_seqlens=np.array([1, 8])), ValueError, f"cu_seqlens: {NOT_FROM_0}"),
    (
        dict(cu_seqlens=np.array([0, 5, 4, 8])),
        ValueError,
        "cu_seqlens: expected entries that do not decrease, got 5, 4 at 1",
    ),
    (
        dict(cu_seqlens=np.array([0, 9])),
        ValueError,
        "cu_seqlens: expected a last entry of at most T=8, got 9",
    ),
]
CHUNKED = [
    (
        dict(cp_context=object()),
        TypeError,
        "cp_context: expected None, got object; call context_parallel_kda with a mesh",
    ),
    (
        dict(cu_seqlens_cpu=CU),
        ValueError,
        "cu_seqlens_cpu: expected None without cu_seqlens, got an array of int64",
    ),
    (dict(cu_seqlens=CU, cu_seqlens_cpu=CU + 1), ValueError, f"cu_seqlens_cpu: {NOT_FROM_0}"),
    (
        dict(cu_seqlens=CU, cu_seqlens_cpu=[0, 8]),
        ValueError,
        "cu_seqlens_cpu: expected cu_seqlens's shape (3,), got (2,)",
    ),
    (
        dict(cu_seqlens=CU, cu_seqlens_cpu=[0, 4, 8]),
        ValueError,
        "cu_seqlens_cpu: expected the entries of cu_seqlens, got 4 for 3 at 1",
    ),
    (dict(chunk_size=48), ValueError, "chunk_size: expected one of (16, 32, 64, 128), got 48"),
    (dict(chunk_size=0), ValueError, "chunk_size: expected one of (16, 32, 64, 128), got 0"),
    (dict(chunk_size=-64), ValueError, "chunk_size: expected one of (16, 32, 64, 128), got -64"),
    (dict(chunk_size=True), TypeError, "chunk_size: expected one of (16, 32, 64, 128), got bool"),
    (dict(chunk_size=64.0), TypeError, "chunk_size: expected one of (16, 32, 64, 128), got float"),
    (
        dict(chunk_indices=np.array([[0, 0]])),
        ValueError,
        "chunk_indices: expected None without cu_seqlens, got an array of int64",
    ),
    (
        dict(cu_seqlens=CU, chunk_indices=np.zeros((2, 2))),
        TypeError,
        f"chunk_indices: expected {INTEGERS}, got an array of float64",
    ),
    (
        dict(cu_seqlens=CU, chunk_indices=np.zeros((1, 2), int)),
        ValueError,
        "chunk_indices: expected the 2 chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, 64)), got 1",
    ),
    (
        dict(cu_seqlens=CU, chunk_indices=np.array([0, 1])),
        ValueError,
        "chunk_indices: expected a shape [NT, 2], got (2,)",
    ),
    (
        dict(cu_seqlens=CU, chunk_indices=np.zeros((3, 2), int)),
        ValueError,
        "chunk_indices: expected [NT, 2] with NT of at most 2, got (3, 2)",
    ),
    (
        dict(cu_seqlens=CU, chunk_indices=np.array([[0, 0], [0, 1]])),
        ValueError,
        "chunk_indices: expected the 2 chunks of cu_seqlens (prepare_chunk_indices(cu_seqlens, 64)), "
        "got 2 chunks that differ",
    ),
    (
        dict(initial_state=zeros(B, HV, K, V), state_v_first=True),
        ValueError,
        "initial_state: expected [N, HV, V, K] = (1, 4, 5, 3), got (1, 4, 3, 5)",
    ),
]
A_LOG = "A_log: expected [HV] = (4,) or [1, 1, HV, 1] = (1, 1, 4, 1)"
GATED = [
    (
        dict(use_gate_in_kernel=True),
        ValueError,
        "A_log: expected an array [HV] for the gate unless lower_bound is given, got None",
    ),
    (dict(A_log=zeros(H)), ValueError, f"{A_LOG}, got (2,)"),
    (dict(use_gate_in_kernel=True, A_log=zeros(H)), ValueError, f"{A_LOG}, got (2,)"),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(1, 1, 128, 1)),
        ValueError,
        f"{A_LOG}, got (1, 1, 128, 1); of a padded one, take the first 4",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(HV), dt_bias=zeros(K, HV)),
        ValueError,
        "dt_bias: expected [HV*K] = (12,) or [HV, K] = (4, 3), got (3, 4)",
    ),
    (
        dict(use_gate_in_kernel=True, lower_bound=float("-inf")),
        ValueError,
        "lower_bound: expected a finite number, got -inf",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(HV, dtype=np.float64)),
        TypeError,
        "A_log: expected at most float32, as g is float32, got float64",
    ),
    (
        dict(use_gate_in_kernel=True, lower_bound=0, safe_gate=True),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate, got 0",
    ),
    (
        dict(use_gate_in_kernel=True, lower_bound=-6.0, safe_gate=True),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate, got -6.0",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(HV), safe_gate=True),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate, got None",
    ),
]
ACTIVATED = [
    (
        dict(allow_neg_eigval=True),
        ValueError,
        "allow_neg_eigval: expected use_beta_sigmoid_in_kernel beside it, got True",
    ),
]
LAYOUT = dict(state_v_first=True, transpose_state_layout=True)
BOTH = "transpose_state_layout: expected None beside state_v_first, got True"
A = zeros(B, T, HV, 64)
STATE_PASS = dict(k=GOOD["k"], w=GOOD["g"], u=GOOD["v"], gk=GOOD["g"])
OUTPUT = dict(q=GOOD["q"], v=GOOD["v"], g=GOOD["g"], A=A, h=zeros(B, 1, HV, K, V), scale=1.0)
WY = dict(k=GOOD["k"], v=GOOD["v"], beta=GOOD["beta"], A=A, gk=GOOD["g"])
INTRA = dict(q=GOOD["q"], k=GOOD["k"], v=GOOD["v"], gk=GOOD["g"], beta=GOOD["beta"])
H_STATE = zeros(B, 1, HV, K, V)
QKV = {name: GOOD[name] for name in ("q", "k", "v")}
BACKWARD = GOOD | dict(Aqk=A, Akk=A, scale=1.0, initial_state=zeros(B, HV, K, V), do=GOOD["v"])
BACKWARD |= dict(dht=BACKWARD["initial_state"])
SAVED = dict(w=GOOD["g"], qg=GOOD["g"], kg=GOOD["g"], v_new=GOOD["v"], h=H_STATE, disable_recompute=True)
SERVED = dict(initial_state=zeros(3, HV, K, V), ssm_state_indices=np.arange(8)[None] % 3)
DAV = QKV | dict(do=GOOD["v"], A=A)
DHU = dict(q=GOOD["g"], k=GOOD["g"], w=GOOD["g"], do=GOOD["v"], dv=GOOD["v"], g=GOOD["beta"], gk=GOOD["g"])
DHU |= dict(h0=BACKWARD["initial_state"], dht=BACKWARD["initial_state"])
FUSED = GOOD | dict(v_new=GOOD["v"], A=A, h=H_STATE, do=GOOD["v"], dh=H_STATE, dv=GOOD["v"])
BWD_INTRA = {name: GOOD[name] for name in ("q", "k", "g", "beta")} | dict(dAqk=A, dAkk=A)
BWD_INTRA |= dict(dq=GOOD["g"], dk=GOOD["g"], db=GOOD["beta"], dg=GOOD["g"])
OFFSETS = dict(cu_seqlens=CU, chunk_offsets=np.array([0, 1, 2]))
STAGES = [
    *(
        (op, given | OFFSETS | row[0], *row[1:])
        for op, given in ((chunk_kda_fwd, GOOD), (chunk_gated_delta_rule_fwd_h, STATE_PASS))
        for row in (
            (
                dict(cu_seqlens=None),
                ValueError,
                "chunk_offsets: expected None without cu_seqlens, got an array of int64",
            ),
            (dict(chunk_offsets=[0, 1, 2]), TypeError, f"chunk_offsets: expected {INTEGERS}, got list"),
            (
                dict(chunk_offsets=np.array([0, 2])),
                ValueError,
                "chunk_offsets: expected [N + 1] = (3,), got (2,)",
            ),
            (
                dict(chunk_offsets=np.array([0, 1, 3])),
                ValueError,
                "chunk_offsets: expected those of cu_seqlens (prepare_chunk_offsets(cu_seqlens, 64)), "
                "got 3 for 2 at 2",
            ),
        )
    ),
    *(
        (chunk_kda, GOOD | dict(use_graph=True, cu_seqlens=CU) | row[0], *row[1:])
        for row in (
            (
                dict(max_num_seqs=3),
                ValueError,
                "max_num_seqs: expected the N=2 sequences of cu_seqlens, got 3; repeat the last entry of "
                "cu_seqlens until there are as many",
            ),
            (dict(max_num_seqs=2.0), TypeError, "max_num_seqs: expected an integer, got float"),
            (dict(max_num_seqs=0), ValueError, "max_num_seqs: expected at least 1, got 0"),
        )
    ),
    (
        prepare_chunk_indices,
        dict(cu_seqlens=CU, chunk_size=64, cu_seqlens_cpu=np.array([0, 4, 8])),
        ValueError,
        "cu_seqlens_cpu: expected the entries of cu_seqlens, got 4 for 3 at 1",
    ),
    *(
        (
            op,
            given | dict(output_dtype=int),
            TypeError,
            f"output_dtype: expected None or one of float64, float32, bfloat16, float16, got {int}",
        )
        for op, given in (
            *((op, GOOD) for op in (chunk_kda, chunk_kda_fwd, fused_recurrent_kda)),
            (chunk_gla_fwd_o_gk, OUTPUT),
        )
    ),
    (chunk_kda, GOOD | LAYOUT, ValueError, BOTH),
    (chunk_kda_fwd, GOOD | LAYOUT, ValueError, BOTH),
    (fused_recurrent_kda, GOOD | LAYOUT, ValueError, BOTH),
    (chunk_gated_delta_rule_fwd_h, STATE_PASS | LAYOUT, ValueError, BOTH),
    (chunk_gla_fwd_o_gk, OUTPUT | LAYOUT, ValueError, BOTH),
    (
        chunk_kda_fwd,
        GOOD | dict(storage_dtype="int8"),
        TypeError,
        "storage_dtype: expected None or one of float64, float32, bfloat16, float16, got 'int8'",
    ),
    (
        chunk_kda,
        GOOD | dict(storage_dtype="none such"),
        TypeError,
        "storage_dtype: expected None or one of float64, float32, bfloat16, float16, got 'none such'",
    ),
    (
        chunk_kda_fwd_intra,
        INTRA | dict(gk=GOOD["k"]),
        ValueError,
        "gk: expected [B, T, HV, K] = (1, 8, 4, 3), got (1, 8, 2, 3)",
    ),
    (
        chunk_kda_fwd_intra,
        INTRA | dict(safe_gate=True, lower_bound=1),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate, got 1",
    ),
    (
        recompute_w_u_fwd,
        WY | dict(A=zeros(B, T, HV, 20)),
        ValueError,
        "A: expected [B, T, HV, C] with C one of (16, 32, 64, 128), got (1, 8, 4, 20)",
    ),
    (
        recompute_w_u_fwd,
        WY | dict(q=zeros(B, T, HV, K)),
        ValueError,
        "q: expected [B, T, H, K] = (1, 8, 2, 3), got (1, 8, 4, 3)",
    ),
    (
        chunk_gated_delta_rule_fwd_h,
        STATE_PASS | dict(g=zeros(B, T, H)),
        ValueError,
        "g: expected [B, T, HV] = (1, 8, 4), got (1, 8, 2)",
    ),
    (
        chunk_gated_delta_rule_fwd_h,
        STATE_PASS | dict(initial_state=zeros(2, HV, K, V)),
        ValueError,
        "initial_state: expected [N, HV, K, V] = (1, 4, 3, 5), got (2, 4, 3, 5)",
    ),
    (
        chunk_gla_fwd_o_gk,
        OUTPUT | dict(h=zeros(B, 2, HV, K, V)),
        ValueError,
        "h: expected [B, NT, HV, K, V] = (1, 1, 4, 3, 5), got (1, 2, 4, 3, 5)",
    ),
    (
        chunk_gla_fwd_o_gk,
        OUTPUT | dict(A=zeros(B, T, HV, 32)),
        ValueError,
        "A: expected [B, T, HV, C] = (1, 8, 4, 64), got (1, 8, 4, 32)",
    ),
    (
        chunk_gla_fwd_o_gk,
        OUTPUT | dict(cu_seqlens=(0, 8), chunk_indices=np.zeros((1, 2), int)),
        TypeError,
        f"cu_seqlens: expected {INTEGERS}, got tuple",
    ),
    (
        chunk_local_cumsum,
        dict(g=[0.0], chunk_size=16),
        TypeError,
        f"g: expected {FLOATS}, got list",
    ),
    (
        chunk_local_cumsum,
        dict(g=GOOD["g"], chunk_size=4),
        ValueError,
        "chunk_size: expected a power of two of at least 8, got 4",
    ),
    (
        chunk_local_cumsum,
        dict(g=GOOD["g"], chunk_size=8.0),
        TypeError,
        "chunk_size: expected a power of two of at least 8, got float",
    ),
    (
        chunk_local_cumsum,
        dict(g=zeros(T), chunk_size=16),
        ValueError,
        "g: expected a shape [B, T, HV, K], got (8,)",
    ),
    (
        fused_kda_gate,
        dict(g=GOOD["g"]),
        ValueError,
        "A_log: expected an array [HV] for the gate unless lower_bound is given, got None",
    ),
    (
        fused_kda_gate,
        dict(g=GOOD["g"], lower_bound=-1, output_dtype=int),
        TypeError,
        "output_dtype: expected None or one of float64, float32, bfloat16, float16, got <class 'int'>",
    ),
    (
        naive_kda_gate,
        dict(g=GOOD["g"], A_log=zeros(H)),
        ValueError,
        f"{A_LOG}, got (2,)",
    ),
    (
        naive_kda_lowerbound_gate,
        dict(g=GOOD["g"], A_log=zeros(HV), lower_bound=None),
        TypeError,
        "lower_bound: expected a number, got NoneType",
    ),
    (
        kda_gate_chunk_cumsum,
        dict(g=GOOD["g"], A_log=zeros(HV), chunk_size=48),
        ValueError,
        "chunk_size: expected a power of two of at least 8, got 48",
    ),
    (
        kda_gate_chunk_cumsum,
        dict(g=zeros(HV, K), A_log=zeros(HV), chunk_size=64),
        ValueError,
        "g: expected a shape [B, T, HV, K], got (4, 3)",
    ),
    (
        kda_gate_bwd,
        dict(g=GOOD["g"], A_log=zeros(HV), dyg=GOOD["k"]),
        ValueError,
        "dyg: expected g's shape (1, 8, 4, 3), got (1, 8, 2, 3)",
    ),
    (
        chunk_kda_bwd_dAv,
        DAV | dict(A=zeros(B, T, HV, 32)),
        ValueError,
        "A: expected [B, T, HV, C] = (1, 8, 4, 64), got (1, 8, 4, 32)",
    ),
    (
        chunk_gated_delta_rule_bwd_dhu,
        DHU | dict(h0=zeros(2, HV, K, V)),
        ValueError,
        "h0: expected [N, HV, K, V] = (1, 4, 3, 5), got (2, 4, 3, 5)",
    ),
    (
        chunk_kda_bwd_wy_dqkg_fused,
        FUSED | dict(dh=zeros(B, 1, HV, V, K)),
        ValueError,
        "dh: expected [B, NT, HV, K, V] = (1, 1, 4, 3, 5), got (1, 1, 4, 5, 3)",
    ),
    (
        chunk_kda_bwd_intra,
        BWD_INTRA | dict(dq=GOOD["q"]),
        ValueError,
        "dq: expected [B, T, HV, K] = (1, 8, 4, 3), got (1, 8, 2, 3)",
    ),
    *(
        (fused_recurrent_kda_fwd, GOOD | SERVED | row[0], *row[1:])
        for row in (
            (
                dict(out=zeros(1)),
                TypeError,
                "out: expected None, got an array of float32; the output is returned",
            ),
            (
                dict(initial_state=None),
                ValueError,
                "initial_state: expected the pool [P, HV, K, V] of the indices, got None",
            ),
            (
                dict(initial_state=None, ssm_state_indices=None),
                ValueError,
                "initial_state: expected states [N, HV, K, V] with inplace_final_state, got None; "
                "pass inplace_final_state=False",
            ),
            (
                dict(initial_state=zeros(3, HV, V, K)),
                ValueError,
                "initial_state: expected [P, HV, K, V] = (P, 4, 3, 5), got (3, 4, 5, 3)",
            ),
            (
                dict(ssm_state_indices=np.zeros(1, int)),
                ValueError,
                "ssm_state_indices: expected [N, M] with a slot for each of 8 tokens, got (1,)",
            ),
            (
                dict(ssm_state_indices=np.zeros((2, 8), int)),
                ValueError,
                "ssm_state_indices: expected a shape [N] or [N, M] with N=1, got (2, 8)",
            ),
            (
                dict(ssm_state_indices=np.full((1, 8), 3)),
                ValueError,
                "ssm_state_indices: expected indices below P=3, got 3",
            ),
            (
                dict(num_accepted_tokens=np.array([9])),
                ValueError,
                "num_accepted_tokens: expected numbers from 1 to M=8, got 9",
            ),
            (
                dict(num_accepted_tokens=np.array([1, 1])),
                ValueError,
                "num_accepted_tokens: expected [N] = (1,), got (2,)",
            ),
            (
                dict(num_accepted_tokens=np.array([1]), ssm_state_indices=None, inplace_final_state=False)
                | dict(initial_state=None),
                ValueError,
                "num_accepted_tokens: expected None without ssm_state_indices, got an array of int64",
            ),
        )
    ),
    *(
        (chunk_kda_bwd, BACKWARD | row[0], *row[1:])
        for row in (
            (dict(do=None), TypeError, f"do: expected {FLOATS}, got NoneType"),
            (dict(scale="1"), TypeError, "scale: expected a number, got str"),
            (
                dict(Akk=zeros(B, T, HV, 32)),
                ValueError,
                "Akk: expected [B, T, HV, C] = (1, 8, 4, 64), got (1, 8, 4, 32)",
            ),
            (
                dict(dht=zeros(B, HV, V, K)),
                ValueError,
                "dht: expected [N, HV, K, V] = (1, 4, 3, 5), got (1, 4, 5, 3)",
            ),
            (
                SAVED | dict(kg=None),
                ValueError,
                "kg: expected the forward's kg with disable_recompute, got None",
            ),
            (
                dict(g=None),
                ValueError,
                "g: expected the forward's cumulative sums of the log decays, got None",
            ),
            (
                dict(g_org=GOOD["g"]),
                ValueError,
                "g_org: expected None without use_gate_in_kernel, got an array of float32",
            ),
            (
                dict(use_gate_in_kernel=True, A_log=zeros(HV)),
                ValueError,
                "g_org: expected the raw gates with use_gate_in_kernel, got None",
            ),
            (
                dict(use_gate_in_kernel=True, g_org=GOOD["g"]),
                ValueError,
                "A_log: expected an array [HV] for the gate unless lower_bound is given, got None",
            ),
        )
    ),
    *(
        (op, dict(chunk_size=64) | row[0], *row[1:])
        for op in (prepare_chunk_offsets, prepare_chunk_indices)
        for row in (
            (dict(cu_seqlens=(0, 8)), TypeError, f"cu_seqlens: expected {INTEGERS}, got tuple"),
            (
                dict(cu_seqlens=np.array([0, 200], np.uint8)),
                TypeError,
                f"cu_seqlens: expected {INTEGERS}, got an array of uint8",
            ),
            (dict(cu_seqlens=CU, chunk_size=64.0), TypeError, "chunk_size: expected an integer, got float"),
            (dict(cu_seqlens=CU, chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
        )
    ),
    (naive_chunk_kda, GOOD | dict(chunk_size=2.0), TypeError, "chunk_size: expected an integer, got float"),
    (naive_chunk_kda, GOOD | dict(chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
    (naive_chunk_kda, GOOD | dict(scale="1"), TypeError, "scale: expected a number, got str"),
    (
        prepare_lens,
        dict(cu_seqlens=np.array([0, 5, 4])),
        ValueError,
        "cu_seqlens: expected entries that do not decrease, got 5, 4 at 1",
    ),
]
REFUSED = [
    *(
        (op, GOOD | row[0], *row[1:])
        for op in (chunk_kda, chunk_kda_fwd, fused_recurrent_kda, naive_recurrent_kda)
        for row in EVERYWHERE
    ),
    *((op, GOOD | row[0], *row[1:]) for op in (chunk_kda, chunk_kda_fwd) for row in CHUNKED),
    *(
        (op, GOOD | row[0], *row[1:])
        for op in (chunk_kda, chunk_kda_fwd, fused_recurrent_kda)
        for row in GATED
    ),
    *((op, GOOD | row[0], *row[1:]) for op in (chunk_kda, fused_recurrent_kda) for row in ACTIVATED),
    *STAGES,
]


@pytest.mark.parametrize(("op", "arguments", "kind", "message"), REFUSED)
def test_refused_in_one_line(op, arguments, kind, message):
    with pytest.raises(kind) as refusal:
        op(**arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("op", [getattr(tops.cpu.kda, name) for name in BY_POSITION])
def test_no_unknown_keyword_is_swallowed(op):
    """Some of FLA's functions take any, `head_first` for one, and do not read it."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'head_first'"):
        op(**{name: 0 for name in inspect.signature(op).parameters}, head_first=True)


STATE = dict(initial_state=zeros(B, HV, K, V))
GATE = dict(A_log=zeros(HV), dt_bias=zeros(HV * K))
ONE_DEVICE = dict(mesh=jax.sharding.Mesh(jax.devices("cpu")[:1], ("t",)), axis_name="t")
# Every public op that takes arrays, with all of them given.
EVERYTHING = {
    chunk_kda: GOOD | STATE | GATE | dict(use_gate_in_kernel=True),
    chunk_kda_fwd: GOOD | STATE | GATE | dict(use_gate_in_kernel=True),
    fused_recurrent_kda: GOOD | STATE | GATE | dict(use_gate_in_kernel=True),
    naive_recurrent_kda: GOOD | STATE,
    naive_chunk_kda: GOOD | STATE,
    context_parallel_kda: GOOD | STATE | GATE | dict(use_gate_in_kernel=True) | ONE_DEVICE,
    chunk_kda_fwd_intra: INTRA,
    recompute_w_u_fwd: WY | dict(q=GOOD["q"]),
    chunk_gated_delta_rule_fwd_h: STATE_PASS | STATE | dict(g=GOOD["beta"]),
    chunk_gla_fwd_o_gk: OUTPUT,
    fused_recurrent_kda_fwd: GOOD | GATE | SERVED | dict(use_gate_in_kernel=True),
    chunk_kda_bwd: BACKWARD | SAVED | GATE | dict(use_gate_in_kernel=True, g_org=GOOD["g"]),
    chunk_kda_bwd_dAv: DAV,
    chunk_gated_delta_rule_bwd_dhu: DHU,
    chunk_kda_bwd_wy_dqkg_fused: FUSED,
    chunk_kda_bwd_intra: BWD_INTRA,
    kda_gate_bwd: GATE | dict(g=GOOD["g"], dyg=GOOD["g"]),
    chunk_local_cumsum: dict(g=GOOD["g"], chunk_size=64),
    kda_gate_chunk_cumsum: GATE | dict(g=GOOD["g"], chunk_size=64),
    kda_gate_fwd: GATE | dict(g=GOOD["g"]),
    naive_kda_gate: GATE | dict(g=GOOD["g"]),
    naive_kda_lowerbound_gate: GATE | dict(g=GOOD["g"]),
}
ARRAYS = [
    (op, name)
    for op, given in EVERYTHING.items()
    for name, x in given.items()
    if isinstance(x, np.ndarray) and x.dtype.kind == "f"
]


def refusal_of(op, arguments, kind):
    """The message, one line that names an argument; the same eagerly and under a transformation."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    others = {name: x for name, x in arguments.items() if name not in arrays}
    messages = set()
    for transformed in (lambda op, **x: op(**x), jax.eval_shape):
        with pytest.raises(kind) as refusal:
            transformed(partial(op, **others), **arrays)
        messages.add(str(refusal.value))
    (message,) = messages
    name, rest = re.fullmatch(r"(\w+): (expected .+, got .+)", message).groups()
    assert name in inspect.signature(op).parameters
    return name, rest


def test_the_table_leaves_no_op_and_no_array_out():
    helpers = {prepare_lens, prepare_chunk_offsets, prepare_chunk_indices}
    public = {getattr(tops.cpu.kda, name) for name in tops.cpu.kda.__all__ if name[0] != "C"}
    assert public == {*EVERYTHING, *helpers}
    packing = {"cu_seqlens", "chunk_indices"}
    for op, given in EVERYTHING.items():
        arrays = {name: x for name, x in given.items() if isinstance(x, np.ndarray)}
        jax.eval_shape(partial(op, **{name: given[name] for name in given.keys() - arrays}), **arrays)
        for name, parameter in inspect.signature(op).parameters.items():
            assert name in given or name in packing or parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_every_array_is_held_to_its_dtype(op, name):
    given = EVERYTHING[op]
    for dtype in ("int32", "complex64", "bool", "float8_e5m2"):
        refused = refusal_of(op, given | {name: given[name].astype(dtype)}, TypeError)
        assert refused == (name, f"expected {FLOATS}, got an array of {dtype}")
    for x, kind in (([1.0], "list"), (1.0, "float"), (given[name].astype(">f4"), "an array of >f4")):
        with pytest.raises(TypeError) as refusal:
            op(**given | {name: x})
        assert str(refusal.value) == f"{name}: expected {FLOATS}, got {kind}"
    with jax.enable_x64(False), pytest.raises(TypeError) as refusal:
        op(**given | {name: given[name].astype(np.float64)})
    expected = "expected float32 or less while jax_enable_x64 is off, got float64"
    assert str(refusal.value) == f"{name}: {expected}"


# What the other arrays of a call do not hold: the leading axes of a gate, an axis that one array alone has,
# H where twice as many heads divide HV too.
ANY_RANK = {(op, "g") for op in (chunk_local_cumsum, kda_gate_fwd, naive_kda_gate, naive_kda_lowerbound_gate)}
ALSO_WITHOUT_A_BATCH = {(op, "initial_state") for op in (naive_recurrent_kda, naive_chunk_kda)}
FREE = {
    (chunk_kda_fwd_intra, "v"): {3},
    (recompute_w_u_fwd, "v"): {3},
    (recompute_w_u_fwd, "A"): {3},
    (chunk_gated_delta_rule_fwd_h, "k"): {2},
    (chunk_gla_fwd_o_gk, "q"): {2},
    (chunk_local_cumsum, "g"): {0, 1, 2, 3},
    (kda_gate_chunk_cumsum, "g"): {0, 1},
    (fused_recurrent_kda_fwd, "initial_state"): {0},
} | {key: {0, 1} for key in ANY_RANK if key[0] is not chunk_local_cumsum}


@pytest.mark.parametrize(("op", "name"), ARRAYS)
def test_every_axis_is_held_to_the_others(op, name):
    """A rank more or less, an axis of 0, an axis of another size. Of two that differ, either may be named."""
    given = EVERYTHING[op]
    x = given[name]
    if (op, name) not in ANY_RANK:
        refusal_of(op, given | {name: x[None]}, ValueError)
        if (op, name) not in ALSO_WITHOUT_A_BATCH:
            refusal_of(op, given | {name: np.asarray(x[0])}, ValueError)
    for axis in range(x.ndim):
        refusal_of(op, given | {name: np.take(x, [], axis)}, ValueError)
        if axis not in FREE.get((op, name), ()):
            refusal_of(op, given | {name: np.concatenate([x, x], axis)}, ValueError)


@pytest.mark.parametrize("op", [*EVERYTHING])
def test_every_flag_is_a_bool(op):
    """What a misplaced positional argument would end up in."""
    names = [name for name, p in inspect.signature(op).parameters.items() if isinstance(p.default, bool)]
    for name in names:
        for x, kind in ((1, "int"), (np.ones(1), "an array of float64"), (None, "NoneType")):
            with pytest.raises(TypeError) as refusal:
                op(**EVERYTHING[op] | {name: x})
            assert str(refusal.value) == f"{name}: expected a bool, got {kind}"


@pytest.mark.parametrize(
    "op", [op for op in EVERYTHING if "storage_dtype" in inspect.signature(op).parameters]
)
def test_no_dtype_that_jax_would_cast_down(op):
    with jax.enable_x64(False), pytest.raises(TypeError) as refusal:
        op(**EVERYTHING[op], storage_dtype=np.float64)
    expected = "expected float32 or less while jax_enable_x64 is off, got float64"
    assert str(refusal.value) == f"storage_dtype: {expected}"


def test_numpy_scalars_are_numbers():
    """They do not widen the arithmetic, as they would in JAX's promotion."""
    gate = dict(use_gate_in_kernel=True, A_log=GATE["A_log"])
    numbers = dict(scale=0.5, lower_bound=-3.0, chunk_size=32)
    scalars = dict(scale=np.float64(0.5), lower_bound=np.float64(-3), chunk_size=np.int64(32))
    program, expected = (
        jax.make_jaxpr(partial(chunk_kda, **gate, **x))(*GOOD.values()) for x in (scalars, numbers)
    )
    assert str(program) == str(expected)
    g = kda_gate_fwd(GOOD["g"], lower_bound=np.float64(-3), output_dtype=None)
    assert g.dtype == np.float32


def test_facts_that_are_static_are_checked_under_jit():
    with pytest.raises(TypeError, match=r"scale: expected a number that is known .*, got a traced float32"):
        jax.jit(chunk_kda)(**GOOD, scale=jnp.float32(1))
    with pytest.raises(TypeError, match="output_final_state: expected a bool, got an array of bool"):
        jax.jit(chunk_kda)(**GOOD, output_final_state=True)
    with pytest.raises(TypeError, match=r"chunk_size: expected one of .*, got an array of int64"):
        jax.jit(chunk_kda)(**GOOD, chunk_size=64)
    known = jnp.array([0, 9])
    with pytest.raises(ValueError, match="cu_seqlens: expected a last entry of at most T=8, got 9"):
        jax.jit(lambda: chunk_kda(**GOOD, cu_seqlens=known))()
    with pytest.raises(ValueError, match=r"chunk_indices: expected the 2 chunks of cu_seqlens .*, got 1"):
        jax.jit(partial(chunk_kda, **GOOD, cu_seqlens=CU))(chunk_indices=np.zeros((1, 2), int))
    with pytest.raises(TypeError, match=r"cu_seqlens: expected values that are known .*, got a traced array"):
        jax.jit(partial(prepare_chunk_indices, chunk_size=64))(CU)


def test_what_is_traced_is_believed():
    """Neither the values of cu_seqlens nor of chunk_indices are known: their shapes alone are held."""
    call = partial(chunk_kda, return_intermediate_states=True)
    indices = prepare_chunk_indices(CU, 64)
    assert jax.eval_shape(call, **GOOD, cu_seqlens=CU, chunk_indices=indices)[2].shape[1] == len(indices)
    traced = jax.eval_shape(partial(call, **GOOD, cu_seqlens=CU), chunk_indices=indices)
    assert traced[2].shape[1] == len(indices)


@pytest.mark.parametrize("op", [chunk_kda, chunk_kda_fwd, chunk_gated_delta_rule_fwd_h])
def test_a_known_copy_of_what_is_traced_counts_the_chunks(op):
    """T = 100 holds up to 3 chunks of two sequences; these make two."""
    known = STATE_PASS if op is chunk_gated_delta_rule_fwd_h else GOOD
    given = {name: np.repeat(x, 13, axis=1)[:, :100] for name, x in known.items()}
    options = {} if known is STATE_PASS else dict(return_intermediate_states=True)
    ends = np.array([0, 50, 100])
    for copy, NT in ((None, 3), (ends, 2), ([0, 50, 100], 2)):
        made = jax.eval_shape(partial(op, **given, **options, cu_seqlens_cpu=copy), cu_seqlens=ends)
        h = made.h if op is chunk_kda_fwd else made[0 if known is STATE_PASS else 2]
        assert h.shape[1] == NT
    assert jax.eval_shape(partial(prepare_chunk_indices, chunk_size=64, cu_seqlens_cpu=ends), ends).shape == (
        2,
        2,
    )
