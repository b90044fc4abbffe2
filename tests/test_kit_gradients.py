"""The conformance kit on gradients: it passes what is right, catches what is wrong, and names the stage.

`faults_backward.py` has the wrong ones. Bounds are those of `test_conformance.py`: 2 yardsticks.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracle_backward
import pytest
from faults_backward import FAULTS, kernel

import tops.cpu.kda as kda
from tops.cpu.kda.testing import CATALOGUE, GRADIENTS, adapters, check, select
from tops.cpu.kda.testing.__main__ import main
from tops.cpu.kda.testing.gradients import BETWEEN, gradient_truth, names

pytestmark = pytest.mark.unoptimized
slow, long = pytest.mark.slow, pytest.mark.long
DTYPES = [np.dtype(np.float32), np.dtype(jnp.bfloat16)]
GRADIENT_OF = {name: f"d{name}" for name in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")}
GRADIENT_OF |= dict(initial_state="d_initial_state")
# One a stage, which CI has in bfloat16 too: the kit has one way for all.
FEW_FAULTS = (
    "dAqk_last_row_stale",
    "dht_ignored",
    "db_by_a_quotient",
    "heads_averaged",
)


OF_ONE_SHAPE = ("dense,weak", "weak", "beta_0_1")  # in CI; the others compile programs of their own
# FLA's own order of operations errs as much in 16 bits.
SHOWN_IN_FLOAT32_ALONE = ("residual_in_16_bits",)


def marks_of(name, dtype):
    if name not in FEW_FAULTS and (dtype != np.float32 or FAULTS[name].cases not in OF_ONE_SHAPE):
        return [slow, long]
    return [slow]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, dtype),
            marks=marks_of(name, dtype),
            id=f"{name}-{dtype}",
        )
        for name in FAULTS
        for dtype in DTYPES
        if dtype == np.float32 or name not in SHOWN_IN_FLOAT32_ALONE
    ],
)
def test_flags_what_is_wrong_and_names_its_stage(name, dtype):
    fault = FAULTS[name]
    report = check(kernel(fault, None if dtype == np.float32 else dtype), fault.cases, dtype, arrays="numpy")
    assert not report.ok
    assert report.first_bad_stage == f"{fault.stage.partition(',')[0]} backwards"


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        pytest.param(DTYPES[0], "dense,weak,beta_0_1", marks=slow),
        pytest.param(DTYPES[0], "uneven,near_keys,converged,packed,sigmoid_batch", marks=[slow, long]),
        pytest.param(DTYPES[1], "weak,uneven,near_keys,converged,packed,sigmoid_batch", marks=[slow, long]),
    ],
)
def test_passes_the_same_without_a_fault(dtype, cases):
    report = check(kernel(None, None if dtype == np.float32 else dtype), cases, dtype, arrays="numpy")
    assert report.ok, str(report)
    if "sigmoid" in cases:
        assert {row.tensor for row in report.rows} == set(GRADIENTS)


@slow
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (kda.chunk_kda, "float32"),
        pytest.param(kda.chunk_kda, "bfloat16", marks=long),
        *(pytest.param(kda.chunk_kda, dtype, marks=long) for dtype in ("float16", "float64")),
        *(
            pytest.param(kda.chunk_kda_bwd, dtype, marks=long)
            for dtype in ("float32", "bfloat16", "float16", "float64")
        ),
    ],
)
def test_passes_our_own(op, dtype):
    """`make conformance` runs all cases."""
    report = check(op, "dense,packed,sigmoid_batch", dtype, gradients=True)
    assert report.ok, str(report)
    assert not report.declined


@slow
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        (kda.naive_recurrent_kda, "float32"),
        pytest.param(kda.naive_recurrent_kda, "bfloat16", marks=long),
        pytest.param(kda.fused_recurrent_kda, "float32", marks=long),
        pytest.param(kda.fused_recurrent_kda, "bfloat16", marks=long),
    ],
)
def test_passes_the_recurrences_by_autodiff(op, dtype):
    report = check(op, "dense,equal_keys,masks,packed", dtype, gradients=True, adapter=adapters.plain)
    assert report.ok, str(report)
    assert not report.declined


def test_goldens_are_what_they_are_defined_as():
    """float64, with what lies between the stages: 1e-11 of the derivatives by a zero added to each tensor."""
    case = CATALOGUE["dense"]
    inputs, golden, *_ = gradient_truth(case, np.dtype(np.float64), saved=True)
    tokens = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    states, scale = inputs["initial_state"], case.K**-0.5
    expected = oracle_backward.backward(
        tokens, inputs["saved_g"], states, inputs["do"], inputs["dht"], scale, case.chunk_size
    )
    wy = {f"{name}_wy": expected[f"ends_{name}"] for name in ("dq", "dk")}
    wy |= dict(dbeta_wy=expected["ends_db"], dG_wy=expected["ends_dG"] / np.log(2))
    expected |= wy | dict(
        dbeta=expected["db"], dG=expected["dG"] / np.log(2), d_initial_state=expected["dh0"]
    )
    grouped = {
        name: expected[name].reshape(case.B, case.T, case.H, 2, case.K).sum(3) for name in ("dq", "dk")
    }
    expected |= grouped
    for name in golden.keys() - {"dg"}:
        np.testing.assert_allclose(golden[name], expected[name], rtol=0, atol=1e-11, err_msg=name)


@cache
def report_of(name):
    return check(kernel(FAULTS[name]), FAULTS[name].cases, "float32", arrays="numpy")


@slow
@pytest.mark.parametrize(
    ("name", "tensor", "start"),
    [
        ("dAqk_last_row_stale", "dAqk", "everywhere, from the last token back"),
        ("dht_ignored", "dh", "everywhere, from the last token back"),
        ("dG_without_the_decay_of_the_state", "dG_wy", "everywhere, from the last token back"),
        ("h_of_the_chunk_behind", "dq_wy", "a chunk boundary: sequences 0, 1 from chunk 1 back"),
    ],
)
def test_says_where_the_error_starts_from_the_end(name, tensor, start):
    (row,) = [row for row in report_of(name).rows if (row.case, row.tensor) == ("weak", tensor)]
    assert row.start == start


def test_a_kernel_that_cannot_be_differentiated():
    with pytest.raises(
        ValueError, match=r"arrays: expected jax or torch, which differentiate, .* got 'numpy'"
    ):
        check(kda.chunk_kda, "dense", gradients=True, arrays="numpy")

    def op(**inputs):
        raise RuntimeError("no rule")

    report = check(op, "dense", gradients=True)
    assert [row.note for row in report.rows] == ["raised RuntimeError: no rule"]


@slow
def test_golden_files_with_gradients(tmp_path, capsys):
    """What `jax.vjp` makes passes; without a gradient, or with one of another sign, it does not."""
    golden, made = tmp_path / "golden", tmp_path / "made"
    made.mkdir()
    assert main(["export", str(golden), "--case", "packed", "--gradients"]) == 0
    manifest = json.loads((golden / "manifest.json").read_text())
    made_of = ("q", "k", "v", "g", "beta", "initial_state")
    named = [GRADIENT_OF[name] for name in made_of]
    arrays = manifest["files"]["packed.float32.npz"]["arrays"]
    assert {"input.do", "input.dht", *(f"golden.{name}" for name in named)} <= arrays.keys()
    with np.load(golden / "packed.float32.npz") as file:
        inputs = {key.removeprefix("input."): file[key] for key in file.files if key.startswith("input.")}
    cotangents, cu_seqlens = (inputs.pop("do"), inputs.pop("dht")), inputs.pop("cu_seqlens")

    def op(given):
        return kda.chunk_kda(**given, cu_seqlens=cu_seqlens, output_final_state=True)

    (o, final_state), pullback = jax.vjp(op, {name: jnp.asarray(x) for name, x in inputs.items()})
    (pulled,) = pullback(cotangents)
    given = dict(zip(named, (pulled[name] for name in made_of), strict=True))
    for change, off in (({}, []), (dict(dg=-given["dg"]), ["dg"]), (dict(dbeta=None), ["dbeta"])):
        shown = {name: x for name, x in (given | change).items() if x is not None}
        np.savez(made / "packed.float32.npz", o=o, final_state=final_state, **shown)
        assert main(["check-files", str(golden), str(made)]) == bool(off)
        text = capsys.readouterr().out
        assert [name for name in named if f"packed: {name} (" in text] == off


@slow
@long
def test_command_line(capsys):
    assert main(["check", "tops.cpu.kda:chunk_kda", "--gradients", "--case", "one_token"]) == 0
    assert "dq" in capsys.readouterr().out
    assert main(["check", "tops.cpu.kda:chunk_kda_bwd", "--case", "one_token"]) == 0
    assert "ok: tops.cpu.kda.chunk_bwd.chunk_kda_bwd" in capsys.readouterr().out


def test_the_gradients_of_a_case_are_those_of_its_inputs():
    for case in select():
        inputs = case.inputs()
        inputs.pop("cu_seqlens", None)
        given = {GRADIENT_OF[name] for name in inputs}
        assert set(names(case)) == given
        assert set(names(case, between=True)) == given | set(BETWEEN)


@slow
def test_a_gradient_of_exactly_zero_may_have_the_roundings_of_its_terms():
    """Where a sequence of one token reads no state, dg is 0: a sum of terms that cancel, about 1 each."""
    case = CATALOGUE["packed_no_state"]
    token = case.cu_seqlens[2]
    _, golden, ours, _ = gradient_truth(case, DTYPES[0])
    assert not golden["dg"][0, token].any()
    assert 1e-9 < np.abs(ours["dg"][0, token]).max() < 1e-6
