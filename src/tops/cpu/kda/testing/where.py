"""Where an error starts, in words."""

import numpy as np

OF_CHUNKS, OF_SEQUENCES = ("h", "dh"), ("final_state", "d_initial_state")
STATES = OF_CHUNKS + OF_SEQUENCES
OF_HEADS = ("dA_log", "ddt_bias")  # no tokens: one block


def start_of(case, tensor, blocks, bad, error, limits):
    """Where the error of a tensor starts, and in which heads; bad [blocks, heads], limits the same.

    Of each sequence and head the first bad row counts, of a gradient the last: a backward goes from the last
    token to the first.
    """
    if tensor in OF_HEADS:
        return "everywhere" + _heads(case, bad)
    backwards = tensor.startswith("d")
    firsts = {}
    order = list(zip(blocks, bad, limits, strict=True))
    for block, heads, limit in reversed(order) if backwards else order:
        for head in np.flatnonzero(heads):
            rows = error[block.row, block.start : block.stop, head].max(axis=-1) > limit[head]
            offset = int(np.argmax(rows))  # 0 too where no row stands out
            if backwards:
                offset = len(rows) - 1 - int(np.argmax(rows[::-1]))
            firsts.setdefault((block.sequence, head), (block, offset))
    sequences = {sequence for sequence, _ in firsts}
    everywhere = sequences == {block.sequence for block in blocks}
    which = f"sequence{'s' * (len(sequences) > 1)} {_listed(sequences)}"
    if tensor in OF_SEQUENCES:
        text = "everywhere" if everywhere else f"{tensor} of {which}"
    else:
        say = _backwards if backwards else _forwards
        text = say(case, tensor, set(firsts.values()), which, everywhere)
    return text + _heads(case, bad)


def _forwards(case, tensor, found, which, everywhere):
    chunk, offset = min((block.chunk, offset) for block, offset in found)
    if tensor not in STATES:
        if all((block.chunk, offset) == (0, 0) for block, offset in found):
            return "everywhere" if everywhere else f"a sequence boundary: {which} from the first token on"
        if all(block.token + case.chunk_size > _length(case, block.sequence) for block, _ in found):
            return f"the last, short chunk of {which}, offset {offset}"
    if all(offset == 0 for _, offset in found):
        return f"a chunk boundary: {which} from chunk {chunk} on"
    return f"inside a chunk: {which}, chunk {chunk}, offset {offset}"


def _backwards(case, tensor, found, which, everywhere):
    chunk, offset = max((block.chunk, offset) for block, offset in found)
    if all(offset == block.stop - block.start - 1 for block, offset in found):
        if all(block.token + case.chunk_size >= _length(case, block.sequence) for block, _ in found):
            at = "everywhere," if everywhere else f"a sequence boundary: {which}"
            return f"{at} from the last token back"
        return f"a chunk boundary: {which} from chunk {chunk} back"
    return f"inside a chunk: {which}, chunk {chunk}, offset {offset}"


def _heads(case, bad):
    """Which heads are off, where not all are."""
    heads = np.flatnonzero(bad.any(axis=0))
    if len(heads) == bad.shape[1]:
        return ""
    if bad.shape[1] != case.HV:
        return f"; q/k heads {_listed(heads)} only"
    group = case.HV // case.H
    q_heads = {head // group for head in heads}
    text = f"; value heads {_listed(heads)} only"
    if len(heads) == group * len(q_heads):
        text += f" (q/k head{'s' * (len(q_heads) > 1)} {_listed(q_heads)})"
    return text


def not_finite(blocks, x, golden):
    """ "NaN in sequences 1, 5, 7", where x is not finite and the golden is; "" where there is no such."""
    found = {}
    for block in blocks:
        rows = x[block.row, block.start : block.stop]
        rows = rows[~np.isfinite(rows) & np.isfinite(golden[block.row, block.start : block.stop])]
        for what, there in (("NaN", np.isnan(rows).any()), ("inf", np.isinf(rows).any())):
            if there:
                found.setdefault(what, set()).add(block.sequence)
    return ", ".join(
        f"{what} in sequence{'s' * (len(which) > 1)} {_listed(which)}" for what, which in found.items()
    )


def _length(case, sequence):
    _, start, end = case.sequences[sequence]
    return end - start


def _listed(numbers):
    return ", ".join(map(str, sorted(map(int, numbers))))
