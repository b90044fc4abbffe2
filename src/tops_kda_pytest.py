"""pytest's options for `pytest --pyargs tops.cpu.kda.testing`; every pytest run in an environment loads it.

Outside of `tops`, and read by path: an import of the package would bind `tops` before a project that has a
package of that name, and would import JAX.
"""

import runpy
from pathlib import Path

PLUGIN = Path(__file__).parent / "tops" / "cpu" / "kda" / "testing" / "plugin.py"
pytest_addoption = runpy.run_path(str(PLUGIN))["pytest_addoption"]
