"""Stage 4: the output."""

from .dot import dot


def combine_o(S, qg, Aqk, v_new, scale):
    """What a chunk reads: from the state that entered it, and from its own tokens.

        o = scale * qg S + Aqk v_new

    S [..., K, V], qg = q * D(i<-0) [..., C, K], Aqk [..., C, C], scaled, v_new [..., C, V].
    Returns o [..., C, V].
    """
    inter = dot("...ik,...kv->...iv", qg, S, parts=4)
    return scale * inter + dot("...ij,...jv->...iv", Aqk, v_new, parts=4)
