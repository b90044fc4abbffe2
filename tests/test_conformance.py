"""The conformance kit passes what is right, catches what is wrong, and says where.

`faults.py` has the wrong ones. Bounds: a right candidate is within the kit's own multiple, 2; a wrong one is
flagged at it. Nothing here is tuned a fault at a time.
"""

import json
import re
import subprocess
import sys
import zlib
from functools import cache, wraps

import jax.numpy as jnp
import numpy as np
import pytest
from faults import FAULTS, PACKING_FAULTS, kernel, packed_kernel
from oracle import recurrence, stages

import tops.cpu.kda as kda
from tops.cpu.kda.testing import CATALOGUE, adapters, check, select, truth
from tops.cpu.kda.testing.__main__ import main
from tops.cpu.kda.testing.compare import compare, half_ulp, ordinal
from tops.cpu.kda.testing.files import check_files, export

DTYPES = [np.dtype(np.float32), np.dtype(jnp.bfloat16)]
ALL_FAULTS = FAULTS | PACKING_FAULTS
