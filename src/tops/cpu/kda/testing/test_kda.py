"""pytest --pyargs tops.cpu.kda.testing --kda-impl package.module:function: one test a case and tensor."""

from functools import cache

import pytest

from .__main__ import SIZES, adapter
from .cases import select
from .convention import Convention
from .coverage import LEAST
from .run import check, load
from .tiers import Tier


def pytest_generate_tests(metafunc):
    options = metafunc.config.option
    if options.kda_impl is None:
        raise pytest.UsageError("--kda-impl: expected package.module:function, got nothing")
    asked, known = tensors(options), convention(options).known
    if asked is not None and not set(asked) <= set(known):
        raise pytest.UsageError(f"--kda-tensors: expected some of {', '.join(known)}, got {','.join(asked)}")
    tests = [
        pytest.param(case, tensor, id=f"{case.name}-{tensor}")
        for case in cases(options)
        for tensor in convention(options).tensors(case, tensors(options))
    ]
    metafunc.parametrize(("case", "tensor"), tests)


def convention(options):
    return Convention.of(load(options.kda_impl), gradients=options.kda_gradients)


def cases(options):
    tier = Tier.of(options.kda_products, options.kda_state_dtype, options.kda_dtype)
    how = convention(options)
    return [case for case in select(options.kda_case) if how.takes(case) and tier.judges(case)]


def tensors(options):
    return options.kda_tensors and tuple(options.kda_tensors.split(","))


@cache
def report(case, impl, dtype, adapter_name, **options):
    return check(load(impl), case, dtype, adapter=adapter(adapter_name), **options)


def report_of(case, options):
    names = "arrays", "gradients", "products", "state_dtype", *SIZES, "aligned", "states"
    given = {name: getattr(options, f"kda_{name}") for name in names}
    how = options.kda_impl, options.kda_dtype, options.kda_adapter
    return report(case, *how, tensors=tensors(options), **given)


def test_kda(case, tensor, request):
    options = request.config.option
    found = report_of(case, options)
    if found.declined:
        # As for `Report.ok`, too few cases are none that pass.
        declined = [bool(report_of(other, options).declined) for other in cases(options)]
        if sum(declined) > (1 - LEAST) * len(declined):
            pytest.fail(f"{options.kda_impl} declines {sum(declined)} of {len(declined)} cases")
        pytest.skip(f"{options.kda_impl} declines {case.name}")
    rows = {row.tensor: row for row in found.rows}
    if tensor not in rows and not found.rows[0].raised:
        # Only what nobody asked for: o, the final state and `--kda-tensors` have a row that fails.
        pytest.skip(f"{tensor} was not returned")
    row = rows.get(tensor) or found.rows[0]  # a call that raises has one row
    assert row.ok, str(row)
