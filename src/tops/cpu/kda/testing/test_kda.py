"""pytest --pyargs tops.cpu.kda.testing --kda-impl package.module:function: one test a case and tensor."""

from functools import cache

import pytest

from . import STAGES, select
from .__main__ import adapter
from .autodiff import is_backward
from .gradients import BETWEEN, names
from .run import check, load, takes, takes_stages


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    if options.kda_impl is None:
        raise pytest.UsageError("--kda-impl: expected package.module:function, got nothing")
    tests = [
        pytest.param(case, tensor, id=f"{case.name}-{tensor}")
        for case in cases(options)
        for tensor in tensors(case, options)
    ]
    metafunc.parametrize(("case", "tensor"), tests)


def cases(options):
    fn = load(options.kda_impl)
    return takes(select(options.kda_case), takes_stages(fn), is_backward(fn))


def tensors(case, options):
    fn = load(options.kda_impl)
    if options.kda_gradients or is_backward(fn):
        return names(case, is_backward(fn))
    shown = STAGES if takes_stages(fn) else ("o", "final_state")
    return [tensor for tensor in shown if tensor != "final_state" or case.state is not None]


@cache
def report(case, impl, dtype, adapter_name, arrays, gradients):
    options = dict(adapter=adapter(adapter_name), arrays=arrays, gradients=gradients)
    return check(load(impl), [case], dtype, **options)


def report_of(case, options):
    how = options.kda_dtype, options.kda_adapter, options.kda_arrays, options.kda_gradients
    return report(case, options.kda_impl, *how)


def test_kda(case, tensor, request):
    options = request.config.option
    found = report_of(case, options)
    if found.declined:
        # As for `Report.ok`, a run of no case is none that passes.
        if all(report_of(other, options).declined for other in cases(options)):
            pytest.fail(f"{options.kda_impl} declines every case: nothing was tested")
        pytest.skip(f"{options.kda_impl} declines {case.name}")
    rows = {row.tensor: row for row in found.rows}
    if tensor in BETWEEN and tensor not in rows and not found.rows[0].raised:
        pytest.skip(f"{options.kda_impl} does not show {tensor}")
    row = rows.get(tensor) or found.rows[0]  # a call that raises has one row
    assert row.ok, str(row)
