"""The page about a Triton kernel runs as printed, in Triton's interpreter."""

import pytest
from pages import run_page

pytest.importorskip("triton", reason="a page about Triton")


def test_triton_page_runs(tmp_path):
    run_page("docs/test_triton.md", tmp_path)
