"""A gradient by a function of its own, also under `vmap`, where all other transformations stay JAX's."""

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_pullback(f, keep, pull):
    """`f(index, *args)` with the gradient `pull(index, args, kept, cotangents, wanted)`.

    `keep(index, *args)` is `f(index, *args), kept`. The index holds integers, which nobody differentiates by;
    `wanted`, like args, has a bool for every array. A primitive makes the tangents of f, and `pull` is its
    transpose. Tangents themselves, and derivatives of the primitive, are JAX's own of f. (`custom_vjp` has no
    forward mode, `linear_call` neither `vmap` nor second derivatives.)
    """

    def push(index, args, kept, tangents):
        return jax.jvp(lambda *args: f(index, *args), args, tangents)[1]

    @jax.custom_jvp
    def call(index, *args):
        return f(index, *args)

    @call.defjvp
    def call_jvp(primals, tangents):
        (index, *args), (_, *tangents) = primals, tangents
        results, kept = keep(index, *args)
        arrays, tree = jax.tree.flatten((index, tuple(args), kept, tuple(tangents)))
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


def _batch(arrays, axes, *, push, pull, avals, **static):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    arrays = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arrays, axes, strict=True)]

    def pull_all(index, args, kept, cotangents, wanted):
        return jax.vmap(lambda *x: pull(*x, wanted))(index, args, kept, cotangents)

    avals = tuple(ShapedArray((size, *x.shape), x.dtype) for x in avals)
    made = _pushed.bind(*arrays, push=jax.vmap(push), pull=pull_all, avals=avals, **static)
    return made, [0] * len(made)


def _jvp(primals, tangents, **static):
    # The index has tangents of no type, which JAX makes itself.
    zeros = (ad.instantiate_zeros(x) for x in tangents)
    return jax.jvp(lambda *arrays: _push(*arrays, **static), primals, tuple(zeros))


def _transpose(cotangents, *arrays, pull, tree, out, **_):
    index, args, kept, tangents = jax.tree.unflatten(tree, arrays)
    wanted = jax.tree.map(ad.is_undefined_primal, tangents, is_leaf=ad.is_undefined_primal)
    cotangents = jax.tree.unflatten(out, map(ad.instantiate_zeros, cotangents))
    pulled = jax.tree.leaves(pull(index, args, kept, cotangents, wanted))
    pulled = [x if y else None for x, y in zip(pulled, jax.tree.leaves(wanted), strict=True)]
    return [None] * (len(arrays) - len(pulled)) + pulled


mlir.register_lowering(_pushed, mlir.lower_fun(_push, multiple_results=True))
batching.primitive_batchers[_pushed] = _batch
ad.primitive_jvps[_pushed] = _jvp
ad.primitive_transposes[_pushed] = _transpose
