"""What of a catalogue a report has not judged, in words."""

LEAST = 0.5  # the part of the cases asked for that a report must have judged to be ok


def features(case):
    """What a case asks of a kernel."""
    lengths = [end - start for _, start, end in case.sequences]
    packed, states = case.cu_seqlens is not None, case.state is not None
    gate = "a raw gate" + (" with a lower bound" if case.lower_bound is not None else "")
    return [
        feature
        for feature, has in {
            "packing": packed,
            "packing with empty sequences": packed and 0 in lengths,
            "padding behind the last sequence": packed and case.cu_seqlens[-1] < case.T,
            "a batch": case.B > 1,
            "GVA": case.HV > case.H,
            f"K of {case.K}": True,
            f"V of {case.V}": True,
            f"chunk_size of {case.chunk_size}": True,
            "a short last chunk": any(n % case.chunk_size for n in lengths),
            "states": states,
            "no states": not states,
            "state_v_first": case.state_v_first,
            gate: case.is_gate_raw,
            "a lower bound without A_log": case.is_gate_raw and "A_log" not in case.gate,
            "l2norm and sigmoid(beta)": case.raw,
            "2 sigmoid(beta)": case.raw and case.allow_neg_eigval,
            "g and beta in q's dtype": case.narrow,
            f"the bit check {case.bits}": case.bits is not None,
        }.items()
        if has
    ]


def missed(asked, judged, declined):
    """The features of the cases asked for that no judged case has, "K of 96" and "K of 160" as one, and the
    names of declined cases that have none of them."""
    seen = {feature for case in judged for feature in features(case)}
    missing = dict.fromkeys(feature for case in asked for feature in features(case) if feature not in seen)
    sizes, words = {}, []
    for feature in missing:
        name, _, size = feature.partition(" of ")
        if size.isdigit():
            sizes.setdefault(name, []).append(int(size))
        else:
            words.append(feature)
    words += [f"{name} of {', '.join(map(str, sorted(some)))}" for name, some in sizes.items()]
    return words + [case.name for case in declined if seen.issuperset(features(case))]
