"""The demo, as a user starts it."""

import re
import subprocess
import sys

import pytest

from tops.cpu.kda.__main__ import parse_args

pytestmark = pytest.mark.unoptimized
DEMO = [sys.executable, "-W", "error", "-m", "tops.cpu.kda"]


def test_demo_prints_its_table():
    options = ["--tokens", "300", "--heads", "2", "--documents", "3", "--chunk-size", "32", "--seed", "1"]
    run = subprocess.run([*DEMO, *options], capture_output=True, text=True, check=True)
    errors = [float(x) for x in re.findall(r"^  error of .*?  +([\d.e+-]+)", run.stdout, re.MULTILINE)]
    assert errors[0] <= 3e-3  # o is rounded to bfloat16: 2**-9 at most, 2**-9 / sqrt(3) on average
    assert errors[1] <= 4e-7
    for name in ("tokens/s", "temporary memory", "300 in 3 documents"):
        assert name in run.stdout
    assert "oracle" in run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "2", "--documents", "3"], "--documents: expected at most --tokens=2, got 3"),
        (["--heads", "0"], "--heads: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    ],
)
def test_demo_refuses_in_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kda", *options])
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_args()
    assert message in capsys.readouterr().err
