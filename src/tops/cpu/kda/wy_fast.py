"""Stage 2: the WY representation, w and u."""

from .dot import dot


def recompute_w_u(Akk, k_in, v, beta):
    """What a chunk would erase of, and write to, a state that it has not seen yet.

        w = Akk (beta * k * D(i<-0))      u = Akk (beta * v)

    Akk [..., C, C], k_in = k * D(i<-0) [..., C, K], v [..., C, V], beta [..., C].
    Returns w [..., C, K] and u [..., C, V].
    """
    beta = beta[..., None]
    return dot("...ij,...jk->...ik", Akk, beta * k_in), dot("...ij,...jv->...iv", Akk, beta * v)
