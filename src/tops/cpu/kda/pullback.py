"""A gradient by a function of its own, where forward mode and every other transformation stay JAX's."""

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_pullback(f, keep, pull):
    """`f(*args)`, whose gradient is `pull(args, kept, cotangents)`; `keep(*args)` is `(f(*args), kept)`.

    A primitive makes the tangents of f, and `pull` is its transpose. Under `vmap`, or differentiated once
    more, it is what `jax.jvp` makes of f. (`custom_vjp` has no forward mode, `linear_call` not these two.)
    """

    def push(args, kept, tangents):
        return jax.jvp(f, args, tangents)[1]

    @jax.custom_jvp
    def call(*args):
        return f(*args)

    @call.defjvp
    def call_jvp(args, tangents):
        results, kept = keep(*args)
        arrays, tree = jax.tree.flatten((args, kept, tangents))
        likes, out = jax.tree.flatten(results)
        avals = tuple(ShapedArray(x.shape, x.dtype) for x in likes)
        made = _pushed.bind(*arrays, push=push, pull=pull, tree=tree, avals=avals, out=out)
        return results, jax.tree.unflatten(out, made)

    return call


_pushed = Primitive("pushed")
_pushed.multiple_results = True


@_pushed.def_impl
def _push(*arrays, push, tree, **_):
    return jax.tree.leaves(push(*jax.tree.unflatten(tree, arrays)))


@_pushed.def_abstract_eval
def _abstract(*_, avals, **__):
    return avals


def _batch(arrays, axes, **static):
    made = jax.vmap(lambda *arrays: _push(*arrays, **static), axes)(*arrays)
    return made, [0] * len(made)


def _jvp(primals, tangents, **static):
    return jax.jvp(
        lambda *arrays: _push(*arrays, **static), primals, tuple(map(ad.instantiate_zeros, tangents))
    )


def _transpose(cotangents, *arrays, pull, tree, out, **_):
    args, kept, _ = jax.tree.unflatten(tree, arrays)
    pulled = pull(args, kept, jax.tree.unflatten(out, map(ad.instantiate_zeros, cotangents)))
    pulled = jax.tree.leaves(pulled)
    wanted = arrays[-len(pulled) :]
    nothing = [None] * (len(arrays) - len(pulled))
    return nothing + [x if ad.is_undefined_primal(y) else None for x, y in zip(pulled, wanted, strict=True)]


mlir.register_lowering(_pushed, mlir.lower_fun(_push, multiple_results=True))
batching.primitive_batchers[_pushed] = _batch
ad.primitive_jvps[_pushed] = _jvp
ad.primitive_transposes[_pushed] = _transpose
