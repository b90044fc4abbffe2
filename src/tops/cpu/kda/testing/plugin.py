"""pytest's options for `pytest --pyargs tops.cpu.kda.testing`.

A plugin, since pytest reads options before it knows where `--pyargs` leads. An installed one loads itself, as
`tops_kda_pytest`; in a copy of the package it is `-p tops.cpu.kda.testing.plugin`.
"""


def pytest_addoption(parser):
    group = parser.getgroup("kda", "conformance of a KDA kernel: pytest --pyargs tops.cpu.kda.testing")
    group.addoption("--kda-impl", metavar="MODULE:FUNCTION", help="the kernel")
    group.addoption("--kda-dtype", default="float32", help="float32 (default), bfloat16, float16 or float64")
    group.addoption(
        "--kda-case", metavar="PATTERN", help="the cases, as names or shell patterns; all by default"
    )
    group.addoption("--kda-gradients", action="store_true", help="judge its gradients, not its results")
    group.addoption("--kda-adapter", help='words as in "plain,tokens=HBTK", or module:function')
    for size in ("K", "V", "H", "HV", "chunk-size"):
        group.addoption(f"--kda-{size}", type=int, metavar="N", help="of all cases")
    group.addoption("--kda-aligned", action="store_true", help="every sequence in whole chunks, no padding")
    group.addoption("--kda-no-states", dest="kda_states", action="store_false", help="no states in or out")
    group.addoption(
        "--kda-tensors", metavar="NAMES", help="judge these alone; all that is returned by default"
    )
    group.addoption(
        "--kda-arrays", default="jax", help="what the kernel is given: jax (default), numpy or torch"
    )
    group.addoption("--kda-products", help="what products of float32 matrices round to, as TF32_TF32_F32")
    group.addoption("--kda-state-dtype", help="bfloat16 or float16, where the kernel carries its state so")
