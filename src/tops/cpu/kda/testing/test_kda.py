"""pytest --pyargs tops.cpu.kda.testing --kda-impl package.module:function: one test a case and tensor."""

from functools import cache

import pytest

from . import STAGES, select
from .__main__ import adapter
from .run import check, load, takes_stages


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    if options.kda_impl is None:
        raise pytest.UsageError("--kda-impl: expected package.module:function, got nothing")
    stages = takes_stages(load(options.kda_impl))
    tests = [
        pytest.param(case, tensor, id=f"{case.name}-{tensor}")
        for case in cases(options)
        for tensor in STAGES
        if (stages or tensor in ("o", "final_state")) and (tensor != "final_state" or case.state is not None)
    ]
    metafunc.parametrize(("case", "tensor"), tests)


def cases(options):
    stages = takes_stages(load(options.kda_impl))
    return [case for case in select(options.kda_case) if not (case.raw and stages)]


@cache
def report(case, impl, dtype, adapter_name, arrays):
    return check(load(impl), [case], dtype, adapter=adapter(adapter_name), arrays=arrays)


def report_of(case, options):
    return report(case, options.kda_impl, options.kda_dtype, options.kda_adapter, options.kda_arrays)


def test_kda(case, tensor, request):
    options = request.config.option
    found = report_of(case, options)
    if found.declined:
        # As for `Report.ok`, a run of no case is none that passes.
        if all(report_of(other, options).declined for other in cases(options)):
            pytest.fail(f"{options.kda_impl} declines every case: nothing was tested")
        pytest.skip(f"{options.kda_impl} declines {case.name}")
    rows = {row.tensor: row for row in found.rows}
    row = rows.get(tensor) or found.rows[0]  # a call that raises has one row
    assert row.ok, str(row)
