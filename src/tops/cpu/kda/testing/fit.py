"""The catalogue in the sizes that a kernel takes."""

import dataclasses
import itertools


def fit(case, K=None, V=None, H=None, HV=None, chunk_size=None, aligned=False, states=True):
    """A case with other sizes; None leaves one as it is.

    With H alone, and with HV alone where it can be, as many value heads read a q/k head as do in the case.
    With `aligned` every sequence is whole chunks, by rounding up, and nothing lies behind the last. Without
    `states` none goes in and none comes out: None for a case that needs one.
    """
    if not states and case.regime == "converged":
        return None
    group = case.HV // case.H
    if H is None and HV is not None:
        H = HV // group if HV % group == 0 else HV
    elif H is not None and HV is None:
        HV = H * group
    given = dict(K=K, V=V, H=H, HV=HV, chunk_size=chunk_size)
    given = {name: size for name, size in given.items() if size is not None}
    case = dataclasses.replace(case, **given, **({} if states else dict(state=None)))
    if not aligned:
        return case
    C = case.chunk_size
    if case.cu_seqlens is None:
        return dataclasses.replace(case, T=-(-case.T // C) * C)
    lengths = (-(-(end - start) // C) * C for _, start, end in case.sequences)
    ends = tuple(itertools.accumulate(lengths, initial=0))
    return dataclasses.replace(case, T=max(ends[-1], 1), cu_seqlens=ends)
