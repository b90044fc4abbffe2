"""What holds for every call: each function checks one property of the calls that its strategy makes.

`test_properties.py` runs a fixed budget of each, `fuzz.py` as many as it is told to.

The bounds. `walk` follows the roundings of the token recurrence through a call, so that its budget knows how
the regime at hand amplifies them. The recurrence has never been seen to use more than two thirds of it;
RECURRENT is 2, since in-kernel activations and, in float64, the walk itself round as well. A chunk's
arithmetic may cost 4 times the recurrence's, and 8 times where keys repeat: the factors of
`test_accuracy.test_no_worse_than_the_recurrence`.
"""

from functools import cache, partial

import jax
import ml_dtypes
import numpy as np
from cases import GATES, SIGNATURES, SINGLE, Case, Signature, cases
from hypothesis import strategies as st
from oracle import stages, walk

from tops.cpu.kda import chunk_kda, chunk_kda_fwd, fused_recurrent_kda

RECURRENT = 2
LEAST = 1e-30  # what underflow may have touched: 2**27 times the least normal float32


def factor(case):
    """How many budgets a chunked op may use."""
    return 8 if case.keys in ("near", "equal") or case.signature.K == 1 else 4


@cache
def compiled(op, s, chunk_size=None, **options):
    options |= dict(output_final_state=True, state_v_first=s.state_v_first)
    if op is not fused_recurrent_kda:
        options |= dict(chunk_size=chunk_size or s.chunk_size)
    if s.gate:
        names = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")
        options |= dict.fromkeys(names, True)
        if s.gate == "sigmoid":
            options |= dict(lower_bound=-5.0, safe_gate=True, allow_neg_eigval=True)
    return jax.jit(partial(op, **options))


def run(op, case, inputs, states, cu_seqlens="the case's", **options):
    """o and the final state [N, HV, K, V] of a call, in NumPy; of `chunk_kda_fwd` all fields, by name."""
    s = case.signature
    cu_seqlens = case.cu_seqlens if isinstance(cu_seqlens, str) else cu_seqlens

    def turn(x):
        return np.swapaxes(np.asarray(x), -1, -2) if s.state_v_first else np.asarray(x)

    gate = case.gate_options() if s.gate else {}
    call = compiled(op, s, **options)
    made = call(*inputs, initial_state=turn(states), cu_seqlens=cu_seqlens, **gate)
    if op is not chunk_kda_fwd:
        return np.asarray(made[0]), turn(made[1])
    fields = {name: np.asarray(x) for name, x in made._asdict().items()}
    return fields | dict(final_state=turn(made.final_state), h=turn(made.h))


def within(x, truth, budget, axes, what):
    """The norm of x - truth over `axes` is at most `budget`; x of 16 bits is rounded once more."""
    assert np.isfinite(x.astype(np.float64)).all(), f"{what} is not finite"
    error = np.linalg.norm(x - truth, axis=axes)
    if x.dtype.itemsize == 2:
        info = ml_dtypes.finfo(x.dtype)
        half_a_step = float(info.eps) / 2 * np.abs(truth) + float(info.smallest_subnormal) / 2
        budget = budget + np.linalg.norm(half_a_step, axis=axes)
    worst = np.unravel_index(np.argmax(error - budget), error.shape)
    assert (error <= budget).all(), (
        f"{what} errs by {error[worst]:.3g} at {worst}, budget {budget[worst]:.3g}"
    )


def truth_of(case, inputs, states):
    arithmetic = np.float64 if case.signature.dtype == "float64" else np.float32
    rounding = dict(arithmetic=arithmetic, raw_gates=case.signature.gate is not None)
    return walk(*case.activated(*inputs), initial_state=states, cu_seqlens=case.cu_seqlens, **rounding)


def against_the_oracle(case):
    """The chunked op and the token op, each within its factor of the budget."""
    inputs, states = case.draw()
    truth = truth_of(case, inputs, states)
    for op, times in ((chunk_kda, factor(case)), (fused_recurrent_kda, RECURRENT)):
        o, final_state = run(op, case, inputs, states)
        assert o.dtype == case.signature.dtype
        within(o, truth["o"], times * truth["o_budget"], (-1,), f"{op.__name__}'s o")
        budget = times * truth["state_budget"]
        within(final_state, truth["final_state"], budget, (-2, -1), f"{op.__name__}'s final state")


def every_field(case):
    """Each field of each chunk against its definition, normwise; zero where no token is.

    qg, kg and g are products and sums of one sign: relative to themselves. Aqk is a sum over K of products
    of unit vectors. An error of L, relative to |k|^2, comes out of the inverse with |Akk| on both sides, and
    goes into w and u. v_new and o answer to the states: the budget of the walk.
    """
    s = case.signature
    inputs, states = case.draw()
    q, k, v, g, beta = case.activated(*inputs)
    fields = run(chunk_kda_fwd, case, inputs, states, disable_recompute=True)
    truth = truth_of(case, inputs, states)
    eps = float(np.finfo(s.dtype).eps)
    scale, group, C = s.K**-0.5, s.HV // s.H, s.chunk_size
    spans = [(row, 0, s.T) for row in range(s.B)]
    if s.N:
        spans = [(0, *span) for span in zip(case.ends, case.ends[1:], strict=False)]
    covered = np.zeros((s.B, s.T), bool)
    i = 0
    for n, (row, start, end) in enumerate(spans):
        i = i if s.N else 0
        covered[row, start:end] = True
        heads = [np.moveaxis(x[row, start:end], 1, 0) for x in (q, k, v, g, beta)]
        heads[:2] = (np.repeat(x, group, axis=0) for x in heads[:2])
        for c, chunk in enumerate(stages(*heads, scale, states[n].astype(np.float64), C)):
            first = start + c * C
            length = chunk["g"].shape[1]
            found = {name: np.moveaxis(fields[name][row, first : first + length], 1, 0) for name in FIELDS}
            norm = partial(np.linalg.norm, axis=(-2, -1))
            amplified = eps * np.linalg.norm(chunk["Akk"], 2, axis=(-2, -1)) ** 2 * (1 + norm(chunk["L"]))
            rounding = {name: eps * norm(np.nan_to_num(chunk[name])) for name in ("qg", "kg")}
            rounding["Aqk"] = eps * scale * length
            rounding |= dict(Akk=amplified, w=amplified * length**0.5, u=amplified * norm(heads[2]))
            tiny = float(np.finfo(s.dtype).tiny) * length * (s.K + s.V) * (1 + np.abs(v).max())
            for name, budget in rounding.items():
                x = found[name][..., : chunk[name].shape[-1]]
                within(x, chunk[name], factor(case) * budget + tiny, (-2, -1), name)
            past = [found[name][..., length:] for name in ("Aqk", "Akk")]
            assert not np.any(past), "Aqk or Akk has columns past the chunk's tokens"
            with np.errstate(invalid="ignore"):
                off = np.abs(found["g"] - chunk["g"])  # NaN of -inf - -inf
            same = (found["g"] == chunk["g"]) | (off <= (length + 4) / 2 * eps * np.abs(chunk["g"]))
            assert same.all(), f"g of chunk {c} of sequence {n}"
            span = np.s_[row, first : first + length]
            budget = factor(case) * truth["v_new_budget"][span]
            within(fields["v_new"][span], truth["v_new"][span], budget, (-1,), "v_new")
            if c == 0:
                np.testing.assert_array_equal(fields["h"][row, i], states[n], "h of a first chunk")
            i += 1
    for name in FIELDS:
        assert not fields[name][~covered].any(), f"{name} at padding"
    assert not s.N or not fields["h"][:, i:].any(), "h of a chunk that is not there"
    within(fields["o"], truth["o"], factor(case) * truth["o_budget"], (-1,), "o")


FIELDS = ("g", "Aqk", "Akk", "w", "u", "qg", "kg", "v_new")


def splitting(case, t):
    """A sequence cut in two, the state passed on, is one call: within the budget, and where chunks meet the
    cut, to the bit."""
    inputs, states = case.draw()
    truth = truth_of(case, inputs, states)
    end = case.ends[1]
    t = min(t, end)
    one = run(chunk_kda, case, inputs, states)
    head = run(chunk_kda, case, inputs, states, np.array([0, t], np.int32))
    rest = [np.roll(x, -t, axis=1) for x in inputs]
    tail = run(chunk_kda, case, rest, head[1], np.array([0, end - t], np.int32))
    o = np.concatenate([head[0][:, :t], tail[0][:, : case.signature.T - t]], axis=1)
    within(o, truth["o"], factor(case) * truth["o_budget"], (-1,), "o")
    within(tail[1], truth["final_state"], factor(case) * truth["state_budget"], (-2, -1), "the final state")
    if t % case.signature.chunk_size == 0:
        np.testing.assert_array_equal(o, one[0])
        np.testing.assert_array_equal(tail[1], one[1])


def permuting(case, order):
    """The packed sequences in another order give the same results in that order, to the bit."""
    inputs, states = case.draw()
    order = [n for n in order if n < case.signature.N]
    starts, lengths = np.array(case.ends[:-1]), np.diff(case.ends)
    moved = np.concatenate([np.arange(starts[n], starts[n] + lengths[n]) for n in order])
    index = np.concatenate([moved, np.arange(case.ends[-1], case.signature.T)]).astype(int)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int32)
    for op in (chunk_kda, fused_recurrent_kda):
        o, final_state = run(op, case, inputs, states)
        o_moved, state_moved = run(op, case, [x[:, index] for x in inputs], states[order], cu_seqlens)
        np.testing.assert_array_equal(o_moved, o[:, index])
        np.testing.assert_array_equal(state_moved, final_state[order])


def scaling_v(case, power):
    """v and the initial state times a power of two: so is all that comes out, to the bit."""
    (q, k, v, g, beta), states = case.draw()
    by = np.asarray(2.0**power).astype(v.dtype)
    scaled = run(chunk_kda, case, (q, k, v * by, g, beta), states * by)
    for x, y in zip(scaled, run(chunk_kda, case, (q, k, v, g, beta), states), strict=True):
        x, y = x.astype(np.float64), y.astype(np.float64) * 2.0**power
        np.testing.assert_array_equal(np.where(abs(x) < LEAST, 0, x), np.where(abs(y) < LEAST, 0, y))


def beta_zero_only_decays(case):
    """The state is its first value times the product of the decays, elementwise: an exponential is within an
    ulp, and each product rounds once. o is what q reads of it, but for the rounding of 16-bit outputs."""
    (q, k, v, g, beta), states = case.draw()
    o, final_state = run(chunk_kda, case, (q, k, 100 * v, g, 0 * beta), states)
    g = g.astype(np.longdouble)  # so that the truth does not round as often as what it judges
    scale, group = case.signature.K**-0.5, case.signature.HV // case.signature.H
    info = np.finfo(final_state.dtype)
    spans = zip(case.ends, case.ends[1:], strict=False)
    for n, (start, end) in enumerate(spans):
        decays = np.cumprod(np.exp(g[0, start:end]), axis=0)[..., None] * states[n]
        decays = np.concatenate([states[n : n + 1], decays])
        rounding = (1.5 * (end - start) + 1) * float(info.eps)
        # A product that falls below the least normal number may be zero from there on.
        floor = float(info.tiny) * (1 + np.abs(states[n]).max())
        off = np.abs(final_state[n] - decays[-1])
        assert (off <= rounding * np.abs(decays[-1]) + floor).all(), f"the state of sequence {n}"
        queries = scale * np.repeat(q[0, start:end], group, axis=1).astype(np.float64)
        expected = np.einsum("thk,thkv->thv", queries, decays[1:])
        sizes = np.einsum("thk,thkv->thv", np.abs(queries), np.abs(decays[1:]))
        allowed = (rounding + case.signature.K * float(info.eps)) * sizes + case.signature.K * floor
        if o.dtype == final_state.dtype:
            assert (np.abs(o[0, start:end] - expected) <= allowed).all(), f"o of sequence {n}"


def chunk_sizes_agree(case):
    """Every chunk size is within the budget of the same truth."""
    inputs, states = case.draw()
    truth = truth_of(case, inputs, states)
    for chunk_size in (16, 32, 64, 128):
        o, final_state = run(chunk_kda, case, inputs, states, chunk_size=chunk_size)
        within(o, truth["o"], factor(case) * truth["o_budget"], (-1,), f"o at chunk size {chunk_size}")
        budget = factor(case) * truth["state_budget"]
        within(final_state, truth["final_state"], budget, (-2, -1), f"the state at chunk size {chunk_size}")


PACKED = [s for s in SIGNATURES if s.N]
SUMMED = [s for s in SIGNATURES if s.dtype in ("float32", "float64") and not s.gate and s.chunk_size < 128]
NORMAL = [gate for gate in GATES if gate != "subnormal"]
# Each property, the arguments that it is given, and its share of the examples.
PROPERTIES = {
    against_the_oracle: (dict(case=cases()), 8),
    every_field: (dict(case=cases(SUMMED[:2] + SUMMED[-2:])), 2),
    splitting: (dict(case=cases([SINGLE]), t=st.integers(0, SINGLE.T) | st.sampled_from([32, 64, 96])), 2),
    permuting: (dict(case=cases(PACKED), order=st.permutations(range(6))), 3),
    scaling_v: (dict(case=cases([s for s in SUMMED if s.N]), power=st.integers(-8, 8)), 2),
    beta_zero_only_decays: (dict(case=cases([s for s in PACKED if not s.gate], NORMAL)), 2),
    chunk_sizes_agree: (dict(case=cases([SINGLE])), 1),
}
__all__ = ["Case", "Signature", *(check.__name__ for check in PROPERTIES)]
