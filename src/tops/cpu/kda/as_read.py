"""Half of an operation that nobody reads, which XLA would compute, is not computed."""

from functools import partial

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval


def as_read(f):
    """`f(*arrays, fields=, **static) -> (array, {field: array})`, traced anew for the fields that are read.

    Which are read is known once the program is whole: a primitive leaves that to JAX's elimination of dead
    code, by a rule of a kind that JAX does not document. Its other rules are those of `f`: under `vmap` it is
    `f`, nothing dropped.
    """
    primitive = Primitive(f.__name__)
    primitive.multiple_results = True

    def flat(*arrays, fields, **static):
        array, made = f(*arrays, fields=fields, **static)
        return [array, *(made[field] for field in fields)]

    def abstract(*arrays, **static):
        return jax.make_jaxpr(partial(flat, **static))(*arrays).out_avals

    def batch(arrays, axes, **static):
        out = jax.vmap(partial(flat, **static), axes)(*arrays)
        return out, [0] * len(out)

    def jvp(primals, tangents, **static):
        return jax.jvp(partial(flat, **static), primals, tuple(ad.instantiate_zeros(x) for x in tangents))

    def drop_unread(read, *rest):
        *_, eqn = rest  # from JAX 0.12 on, behind what else is live
        if not any(read):
            return [False] * len(eqn.invars), None
        fields = [field for field, is_read in zip(eqn.params["fields"], read[1:], strict=True) if is_read]
        outvars = [x for x, is_read in zip(eqn.outvars[1:], read[1:], strict=True) if is_read]
        params = eqn.params | dict(fields=tuple(fields))
        return [True] * len(eqn.invars), eqn.replace(outvars=[eqn.outvars[0], *outvars], params=params)

    primitive.def_impl(flat)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(flat, multiple_results=True))
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    partial_eval.dce_rules[primitive] = drop_unread

    def call(*arrays, fields, **static):
        array, *made = primitive.bind(*arrays, fields=fields, **static)
        return array, dict(zip(fields, made, strict=True))

    return call
