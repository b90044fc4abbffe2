"""Against FLA's own kernel: `fused_recurrent_kda_fwd`, from states and from a pool of them."""

import kernels
import numpy as np
import pytest
from inputs import draw
from test_parity import assert_near

import tops.cpu.kda as kda

PACKED = dict(cu_seqlens=np.array([0, 3, 3, 4, 6]))
TURNED = dict(state_v_first=True)
LAST = dict(inplace_final_state=False, output_final_state=True)
RAW = dict(use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, use_qk_l2norm_in_kernel=True)
BOUNDED = dict(gate=("dt_bias",), lower_bound=-5.0, allow_neg_eigval=True)
# Slots for one token, and for three drafted ones, in a pool of ten.
ONE, DRAFTED = np.array([4, 0, 2, 7]), np.array([[4, 0, 2], [1, 9, 6], [3, 8, 5]])
# The sizes; the slots, or None for a state of each sequence; the options.
CASES = dict(
    dense=(dict(B=2, T=5), None, LAST | dict(scale=0.7)),
    no_initial_state=(dict(B=2, T=5), None, LAST | dict(initial_state=None)),
    in_place=(dict(B=2, T=5, HV=4), None, TURNED),
    packed=(dict(T=6, HV=4), None, PACKED | LAST | TURNED),
    packed_in_place=(dict(T=6), None, PACKED),
    pool=(dict(B=4, T=1, HV=4), ONE, dict()),
    pool_packed=(dict(T=4), ONE, dict(cu_seqlens=np.arange(5)) | TURNED),
    pool_left_alone=(dict(B=4, T=1), ONE, LAST),
    drafted=(dict(B=3, T=3), DRAFTED, dict()),
    accepted=(dict(B=3, T=3), DRAFTED, dict(num_accepted_tokens=np.array([1, 3, 2]))),
    accepted_packed=(
        dict(T=6),
        DRAFTED,
        dict(num_accepted_tokens=np.array([3, 1, 2]), cu_seqlens=np.array([0, 3, 3, 6])) | TURNED,
    ),
    beta_of_channels=(dict(B=2, T=5, V=48), None, LAST | dict(channels=True)),
    raw=(dict(B=3, T=3, HV=4), DRAFTED, RAW | dict(gate=("A_log", "dt_bias"), channels=True)),
    raw_bounded=(dict(B=2, T=5), None, LAST | RAW | BOUNDED),
)  # fmt: skip
# These have the pool, packing, all activations and both layouts; `make test-fla-all` runs the others too.
FEW = ("packed", "pool", "accepted_packed", "raw")
ALL_CASES = [*FEW, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in FEW)]


def prepare(sizes, slots, options, dtype):
    """The inputs and the keyword arguments that both take."""
    q, k, v, g, beta = draw(**dict(H=2, K=32) | sizes)
    options, rng = dict(options), np.random.default_rng(1)
    HV, V, K = *v.shape[2:], k.shape[-1]
    if options.pop("channels", False):
        beta = rng.random(v.shape).astype(np.float32)
    if "use_gate_in_kernel" in options:
        q, k, g, beta = 3 * q, 0.1 * k, *(rng.standard_normal(x.shape) for x in (g, beta))
        made = dict(A_log=rng.standard_normal(HV), dt_bias=rng.standard_normal(HV * K))
        options |= {name: made[name].astype(np.float32) for name in options.pop("gate")}
    if "initial_state" not in options:
        N = len(options["cu_seqlens"]) - 1 if "cu_seqlens" in options else len(q)
        state = (V, K) if "state_v_first" in options else (K, V)
        options["initial_state"] = rng.standard_normal((N if slots is None else 10, HV, *state)).astype(dtype)
    inputs = [x.astype(dtype) for x in (q, k, v)] + [x.astype(np.float32) for x in (g, beta)]
    return inputs, options | dict(ssm_state_indices=slots)


@pytest.mark.parametrize("dtype", [np.float32, *kernels.STORAGE_DTYPES])
@pytest.mark.parametrize("case", ALL_CASES)
def test_fused_recurrent_kda_fwd(case, dtype):
    """o and the states: within 5e-6 in float32, 99.9 % within 1 ulp in 16 bits. Slots of no token keep their
    states to the bit."""
    inputs, options = prepare(*CASES[case], dtype)
    theirs = kernels.run(kernels.decode.fused_recurrent_kda_fwd, *inputs, **options)
    ours = [np.asarray(x) for x in kda.fused_recurrent_kda_fwd(*inputs, **options)]
    for x, y in zip(theirs, ours, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
    assert_near({name: pair for name, *pair in zip(("o", "states"), theirs, ours, strict=True)}, ulps=1)
    slots = options["ssm_state_indices"]
    if slots is not None and "inplace_final_state" not in options:
        others = np.setdiff1d(np.arange(10), slots)
        np.testing.assert_array_equal(ours[1][others], options["initial_state"][others])
        np.testing.assert_array_equal(theirs[1][others], options["initial_state"][others])
