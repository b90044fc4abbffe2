"""How a candidate is called, and what of it is judged."""

import inspect
from typing import NamedTuple

from .golden import STAGES
from .gradients import GRADIENTS, OF, names

RESULTS = ("o", "final_state")


class Convention(NamedTuple):
    """One of three calls, and whether the results or the gradients are judged."""

    stages: bool  # chunk_kda_fwd's, whose fields are judged
    gradients: bool
    backward: bool  # chunk_kda_bwd's, whose gradients are judged, and what lies between its stages

    @classmethod
    def of(cls, fn, stages=None, gradients=False):
        """fn's, by its parameters where `stages` is None: `chunk_kda` takes disable_recompute too."""
        parameters = inspect.signature(fn).parameters.keys()
        backward = {"do", "dht"} <= parameters
        if stages is None:
            stages = "disable_recompute" in parameters and "use_qk_l2norm_in_kernel" not in parameters
        return cls(stages and not backward, gradients or backward, backward)

    def takes(self, case):
        """Whether a case can be asked: q, k and beta come raw to `chunk_kda` alone, cumulative sums, which
        `chunk_kda_bwd` is given, hold no gate of -inf, and checks to the bit are of results."""
        if self.gradients and case.bits:
            return False
        return not (case.raw and (self.stages or self.backward)) and not (
            self.backward and case.regime == "resets"
        )

    def options(self, case):
        return case.options(self.stages or self.backward)

    def tensors(self, case, asked=None):
        """The names of the tensors that a case is judged by, of those asked for."""
        if self.gradients:
            shown = names(case, between=self.backward)
        else:
            shown = STAGES if self.stages and not case.bits else RESULTS
            shown = [name for name in STAGES if name in shown]
            shown = [name for name in shown if name != "final_state" or case.state is not None]
        return [name for name in shown if asked is None or name in asked]

    @property
    def known(self):
        """All the tensors that can be asked for; those of `required` must be there if none is."""
        return tuple(GRADIENTS if self.gradients else STAGES)

    @property
    def required(self):
        return tuple(OF if self.gradients else RESULTS)

    @property
    def names_stages(self):
        """Whether the first stage that is off can be told."""
        return self.backward or (self.stages and not self.gradients)
