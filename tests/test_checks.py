"""Bad input is refused in one line that names the argument, what was expected, and what came."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, naive_recurrent_kda

B, T, H, HV, K, V = 1, 8, 2, 4, 3, 5


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = dict(
    q=zeros(B, T, H, K), k=zeros(B, T, H, K), v=zeros(B, T, HV, V), g=zeros(B, T, HV, K), beta=zeros(B, T, HV)
)
TWICE = {name: np.concatenate([x, x]) for name, x in GOOD.items()}
CU = np.array([0, 3, 8])
FLOATS = "an array of float64, float32, bfloat16, float16"

EVERYWHERE = [
    (dict(q=zeros(T, H, K)), ValueError, "q: expected a shape [B, T, H, K], got (8, 2, 3)"),
    (
        {name: x[:, :0] for name, x in GOOD.items()},
        ValueError,
        "q: expected [B, T, H, K] with T, H and K of at least 1, got (1, 0, 2, 3)",
    ),
    (dict(k=zeros(B, T, H, 4)), ValueError, "k: expected [B, T, H, K] = (1, 8, 2, 3), got (1, 8, 2, 4)"),
    (dict(v=zeros(T, HV, V)), ValueError, "v: expected a shape [B, T, HV, V], got (8, 4, 5)"),
    (dict(v=zeros(B, 7, HV, V)), ValueError, "v: expected [B, T, HV, V] = (1, 8, 4, 5), got (1, 7, 4, 5)"),
    (
        dict(v=zeros(B, T, HV, 0)),
        ValueError,
        "v: expected [B, T, HV, V] with HV and V of at least 1, got (1, 8, 4, 0)",
    ),
    (
        dict(v=zeros(B, T, 3, V)),
        ValueError,
        "v: expected [B, T, HV, V] with HV a multiple of H=2, got (1, 8, 3, 5)",
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
    (dict(v=zeros(B, T, HV, V, dtype=np.float64)), TypeError, "v: expected q's dtype float32, got float64"),
    (
        dict(g=zeros(B, T, HV, K, dtype=np.float64)),
        TypeError,
        "g: expected at most float32, as q is float32, got float64",
    ),
    (dict(scale="1"), TypeError, "scale: expected a number, got str"),
    (dict(scale=True), TypeError, "scale: expected a number, got bool"),
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
    (dict(cu_seqlens=[0, 8]), TypeError, "cu_seqlens: expected an integer array, got list"),
    (
        dict(cu_seqlens=np.array([0.0, 8.0])),
        TypeError,
        "cu_seqlens: expected an integer array, got an array of float64",
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
    (dict(cu_seqlens=np.array([1, 8])), ValueError, "cu_seqlens: expected a first entry of 0, got 1"),
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
    (dict(chunk_size=48), ValueError, "chunk_size: expected one of (16, 32, 64, 128), got 48"),
    (dict(chunk_size=64.0), TypeError, "chunk_size: expected one of (16, 32, 64, 128), got float"),
    (
        dict(chunk_indices=np.array([[0, 0]])),
        ValueError,
        "chunk_indices: expected None without cu_seqlens, got an array of int64",
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
FWD = [
    (
        dict(use_gate_in_kernel=True),
        ValueError,
        "A_log: expected an array [HV] with use_gate_in_kernel unless lower_bound is given, got None",
    ),
    (
        dict(A_log=zeros(HV)),
        ValueError,
        "A_log: expected None without use_gate_in_kernel, got an array of float32",
    ),
    (
        dict(dt_bias=zeros(HV * K)),
        ValueError,
        "dt_bias: expected None without use_gate_in_kernel, got an array of float32",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(H)),
        ValueError,
        "A_log: expected [HV] = (4,), got (2,)",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(HV), dt_bias=zeros(HV, K)),
        ValueError,
        "dt_bias: expected [HV*K] = (12,), got (4, 3)",
    ),
    (
        dict(use_gate_in_kernel=True, lower_bound=-6.0, safe_gate=True),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate and use_gate_in_kernel, got -6.0",
    ),
    (
        dict(use_gate_in_kernel=True, A_log=zeros(HV), safe_gate=True),
        ValueError,
        "lower_bound: expected a number in [-5, 0) with safe_gate and use_gate_in_kernel, got None",
    ),
]
REFUSED = [
    *((op, *row) for op in (chunk_kda, chunk_kda_fwd, naive_recurrent_kda) for row in EVERYWHERE),
    *((op, *row) for op in (chunk_kda, chunk_kda_fwd) for row in CHUNKED),
    *((chunk_kda_fwd, *row) for row in FWD),
]


@pytest.mark.parametrize(("op", "arguments", "kind", "message"), REFUSED)
def test_refused_in_one_line(op, arguments, kind, message):
    with pytest.raises(kind) as refusal:
        op(**GOOD | arguments)
    assert str(refusal.value) == message


def test_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match=r"k: expected \[B, T, H, K\] = \(1, 8, 2, 3\), got \(1, 8, 2, 4\)"):
        jax.jit(chunk_kda)(**GOOD | dict(k=zeros(B, T, H, 4)))
    with pytest.raises(TypeError, match="scale: expected a number, got an array of float32"):
        jax.jit(chunk_kda)(**GOOD, scale=jnp.float32(1))


def test_float64_is_refused_while_x64_is_off():
    wide = {name: x.astype(np.float64) for name, x in GOOD.items()}
    with jax.enable_x64(False), pytest.raises(TypeError) as refusal:
        chunk_kda(**wide)
    message = "q: expected float32 or less while jax_enable_x64 is off, got float64"
    assert str(refusal.value) == message
