"""What FLA makes of a case in Triton's interpreter takes seconds: the tests of a case share a process."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "case" in params:
            item.add_marker(pytest.mark.xdist_group(f"{params['case']} {params.get('dtype')}"))
