"""The conformance kit flags what one kind of input shows, says what it has not judged, and fits a kernel.

`misses.py` has the wrong kernels, in NumPy. Bounds: the kit's multiple, 2, and the same bits where it asks.
"""

import dataclasses

import numpy as np
import pytest
import right
from misses import MISSES, chunked

import tops.cpu.kda as kda
from tops.cpu.kda.testing import CATALOGUE, Case, check, select
from tops.cpu.kda.testing.__main__ import main
from tops.cpu.kda.testing.coverage import missed
from tops.cpu.kda.testing.fit import fit

pytestmark = pytest.mark.unoptimized
slow = pytest.mark.slow
QUICK = (
    "dense",
    "strong",
    "converged",
    "causality",
    "neighbours",
    "containment",
    "packed_containment",
    "determinism",
)
BITS = "causality,neighbours,containment,packed_containment,determinism"


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case.name, marks=[] if case.name in QUICK and miss.dtype != np.float16 else slow)
        for name, miss in MISSES.items()
        for case in select(miss.cases)
    ],
)
def test_flags(name, case):
    kernel, _, dtype = MISSES[name]
    assert not check(kernel, case, dtype, arrays="numpy", stages=False).right


@pytest.mark.parametrize("op", [chunked, right.kernel(chunk=1)])
def test_right_kernels_hold_to_the_bit(op):
    report = check(op, BITS, arrays="numpy", stages=False)
    assert report.ok, str(report)
    assert report.verdict.endswith(f"no tensor was compared; to the bit: {BITS.replace(',', ', ')}")


@pytest.mark.parametrize("op", [kda.chunk_kda, pytest.param(kda.chunk_kda_fwd, marks=slow)])
def test_ours_holds_to_the_bit(op):
    report = check(op, BITS)
    assert report.ok, str(report)
    assert {row.tensor for row in report.rows} == {"o", "final_state"}


def test_says_what_changed_to_the_bit():
    row = next(
        row
        for row in check(MISSES["mask_by_multiplication"].kernel, "packed_containment", arrays="numpy").rows
        if not row.ok
    )
    told = "packed_containment: final_state (bits) changes to what is not finite with nan in sequences 2, 4"
    assert str(row).startswith(told)


def test_says_which_sequences_are_not_finite():
    def op(**inputs):
        o, final_state = chunked(**inputs)
        for n in (1, 5, 7):
            final_state[n, 0, 0, 0] = np.nan
        o[0, 3] = np.inf
        return o, final_state

    report = check(op, "packed", arrays="numpy")
    assert report.verdict.endswith(
        "2 of 2 tensors of 1 cases in float32 are more than 2 yardsticks off in 1 case; not finite in packed"
    )
    final_state, o = map(str, report.rows)
    assert final_state.startswith("packed: final_state (3 state) NaN in sequences 1, 5, 7; ")
    assert o.startswith("packed: o (4 output) inf in sequence 0; ")
    assert "!NaN" in str(report)


def takes_no_packs(*, cu_seqlens=None, **inputs):
    if cu_seqlens is not None:
        raise NotImplementedError
    return chunked(**inputs)


def test_a_report_on_too_little_is_not_ok(capsys):
    """Nothing is wrong in it; the exit status is 3."""
    cases = "dense,packed,packed_full"
    report = check(takes_no_packs, cases, arrays="numpy")
    assert report.right
    assert not report.ok
    assert report.verdict.endswith(
        "; 1 of 3 cases could be judged, less than 50%; declined: packed, packed_full"
    )
    missed = ["packing", "packing with empty sequences", "padding behind the last sequence"]
    assert report.missed == missed
    assert main(["check", "test_kit_misses:takes_no_packs", "--arrays", "numpy", "--case", cases]) == 3
    assert f"\nnot judged: {', '.join(missed)}\n" in capsys.readouterr().out


@slow
@pytest.mark.long
def test_the_catalogue_in_the_sizes_that_a_kernel_takes():
    """One that takes nothing but K = V = 128 is not judged by the catalogue as it is, nor is it wrong."""
    command = ["check", "misses:takes_128_alone", "--arrays", "numpy", "--case", "dense,odd,layer"]
    assert main(command) == 3
    assert main([*command, "--K", "128", "--V", "128", "--H", "2", "--aligned", "--name", "wide"]) == 0
    wrong = MISSES["packed_128_reads_the_next_state"].kernel
    assert not check(wrong, "packed", arrays="numpy", K=128, V=128).right


def test_fitted_cases_keep_what_they_are_about():
    case = fit(CATALOGUE["packed"], K=128, H=3, aligned=True)
    assert (case.K, case.V, case.H, case.HV) == (128, 24, 3, 6)
    assert case.cu_seqlens == (0, 128, 128, 192, 256, 320, 320, 384, 384)
    assert case.T == 384
    assert fit(CATALOGUE["one_over"], aligned=True).T == 128
    assert fit(CATALOGUE["odd"], HV=4).H == 4
    assert fit(CATALOGUE["dense"], HV=8).H == 4
    for case in CATALOGUE.values():
        assert fit(case) == case
    assert fit(CATALOGUE["packed"], states=False).state is None
    assert fit(CATALOGUE["converged"], states=False) is None


def without_states(q, k, v, g, beta, scale):
    return chunked(q=q, k=k, v=v, g=g, beta=beta, scale=scale)[:1]


@slow
def test_a_kernel_without_states_is_judged_without():
    report = check(without_states, "dense,converged", arrays="numpy", states=False)
    assert [row.tensor for row in report.rows] == ["o"]
    assert report.ok
    assert report.missed[0] == "states"


def test_what_a_convention_cannot_be_asked_is_declined():
    """A test of one case can skip it."""
    assert check(kda.chunk_kda, "causality", gradients=True).declined == ["causality"]
    assert check(kda.chunk_kda_fwd, "raw").declined == ["raw"]


def test_says_by_feature_what_is_not_judged():
    judged = [CATALOGUE[name] for name in ("dense", "packed_full")]
    declined = [CATALOGUE[name] for name in ("packed", "K_96", "K_160", "weak")]
    assert missed([*judged, *declined], judged, declined) == [
        "packing with empty sequences", "padding behind the last sequence", "K of 96, 160", "weak",
    ]  # fmt: skip


def test_partial_stages_are_judged():
    """What is not returned is not wrong, unless it is asked for."""
    kernel = right.kernel(stages=True)

    def part(**inputs):
        made = kernel(**inputs)
        return dict(o=made["o"], final_state=made["final_state"], g=made["g"], Aqk=None)

    report = check(part, "dense", arrays="numpy", stages=True, name="mine")
    assert report.ok, str(report)
    assert report.candidate == "mine"
    assert [row.tensor for row in report.rows] == ["g", "final_state", "o"]
    assert report.missed == ["Aqk", "Akk", "w", "u", "qg", "kg", "h", "v_new"]
    report = check(part, "dense", arrays="numpy", stages=True, tensors=("g", "Aqk"))
    assert [(row.tensor, row.note) for row in report.rows] == [("g", ""), ("Aqk", "was not returned")]
    assert "missing, or not as it should be, in dense" in report.verdict
    with pytest.raises(ValueError, match=r"tensors: expected some of g, Aqk, .* got \['h0'\]"):
        check(part, "dense", tensors=["h0"])


@slow
def test_a_case_of_ones_own():
    """One or many; what cannot be is refused in one line."""
    case = dataclasses.replace(CATALOGUE["dense"], name="mine", V=16)
    assert check(chunked, case, arrays="numpy").ok
    assert [row.case for row in check(chunked, (case, CATALOGUE["dense"]), arrays="numpy").rows][::2] == [
        "mine",
        "dense",
    ]
    with pytest.raises(TypeError, match="cases: expected a pattern, a Case or Cases, got 'dense' among them"):
        check(chunked, ["dense"])
    for wrong, message in {
        "HV: expected a multiple of H=2, got 3": dict(HV=3),
        "T: expected an integer of at least 1, got 0": dict(T=0),
        "cu_seqlens: expected a tuple of integers that rise from 0 to at most T=10, got \\(0, 11\\)": dict(
            B=1, T=10, cu_seqlens=(0, 11)
        ),
        "B: expected 1, which holds the packed sequences, got 2": dict(cu_seqlens=(0, 5)),
        "regime: expected one of logsigmoid, .*, got 'mild'": dict(regime="mild"),
        "gate: expected A_log unless lower_bound is given, got \\('dt_bias',\\)": dict(gate=("dt_bias",)),
        "state: expected a number, for v to answer, got None": dict(regime="converged", state=None),
        "chunk_size: expected one of \\(16, 32, 64, 128\\), got 48": dict(chunk_size=48),
        "scale: expected a number or None, got 'x'": dict(scale="x"),
        "bits: expected one of causality, .*, got 'all'": dict(bits="all"),
        "B: expected more than 1, for neighbours, got 1": dict(bits="neighbours", B=1),
    }.items():
        with pytest.raises(ValueError, match=f"^Case 'mine': {wrong}$"):
            Case("mine", "", **message)


def test_a_converged_layer_is_one():
    """v is what the state answers, up to a few thousandths of it."""
    inputs = CATALOGUE["converged"].inputs(np.float64)
    _, final_state = chunked(**inputs, scale=1.0, output_final_state=True)
    faded = inputs["initial_state"] * np.exp(inputs["g"].sum(1))[..., None]
    assert np.linalg.norm(final_state - faded) < 2e-3 * np.linalg.norm(faded)
