"""The conformance kit: is a KDA kernel right, and if not, in which stage, from where on?"""

from . import adapters
from .cases import CATALOGUE, VERSION, Case, select
from .compare import MULTIPLE, compare
from .given import assert_right
from .golden import STAGES, truth
from .gradients import GRADIENTS, gradient_truth
from .report import Report, Row
from .run import check

__all__ = [
    "CATALOGUE",
    "GRADIENTS",
    "MULTIPLE",
    "STAGES",
    "VERSION",
    "Case",
    "Report",
    "Row",
    "adapters",
    "assert_right",
    "check",
    "compare",
    "gradient_truth",
    "select",
    "truth",
]
