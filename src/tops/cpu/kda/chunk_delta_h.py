"""Stage 3: the state from chunk to chunk."""

from .dot import dot


def delta_h(S, w, u, kg, decay):
    """One chunk's step of the state.

        v_new = u - w S      S <- D(C<-0) S + kg^T v_new

    S [..., K, V], w [..., C, K], u [..., C, V], kg = k * D(C<-j) [..., C, K], decay = D(C<-0) [..., K].
    Returns v_new [..., C, V] and the state that leaves the chunk.

    These two products feed the state that all later chunks read: their sums are taken in parts.
    """
    v_new = u - dot("...ik,...kv->...iv", w, S, parts=4)
    return v_new, decay[..., None] * S + dot("...jk,...jv->...kv", kg, v_new, parts=4)
