"""The yardstick of a kernel whose products round their operands, or that carries its state in 16 bits.

TPUs and GPUs multiply float32 matrices in fewer bits unless told otherwise. What a right kernel errs by then
is what our own forward, or its gradient, errs by when it does the same. `tiered` makes it do so from outside:
it traces a function and runs what was traced, with every product of matrices and the state of the scan over
chunks rounded. The functions themselves know nothing of it.

What is emulated, and how far:

- Both operands of every `dot_general` are rounded, to nearest even; the sum is float32's. Under X3 each
  operand is the sum of two rounded ones, and three of the four products are summed, the small ones first.
- Our forward writes sums of x y over channels (q . k of the diagonal, and in the backward those of d_beta and
  of d_decay) as a product with ones: there x and y are rounded, as in a product of matrices.
- The inverse of blocks of 16 tokens is a loop in float32, as FLA's is: a kernel that takes it by products
  errs more there. So do kernels that form a decay as a product of matrices, or sum gates by one.
- The state is rounded when it enters, and after each chunk. A kernel that rounds it at every token errs more.
- One rounded score errs alike in a whole row of o, so that the largest error is a throw of few dice. `GRIDS`
  has several throws: operands are rounded on other grids, as fine; what lies on the first one stays.
- Primitives whose programs JAX does not show are left alone: `pallas_call`, and the tangents of `pullback.py`
  in forward mode.
"""

from functools import partial, wraps
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from .. import checks

# JAX's names: the bits of a rounded mantissa, without the leading one, and whether in three products. Those
# with more products, and TF32 in three, are as exact as float32's own.
PRODUCTS = {
    "TF32_TF32_F32": (10, False),
    "BF16_BF16_F32": (7, False),
    "BF16_BF16_F32_X3": (7, True),
}


class Tier(NamedTuple):
    """What is rounded beyond what a dtype says; by default nothing."""

    products: str | None = None
    state_dtype: jnp.dtype | None = None

    @staticmethod
    def of(products, state_dtype, dtype):
        """The tier of a candidate of `dtype`; products may be a `DotAlgorithmPreset`. ValueError or TypeError
        in one line where there is none."""
        products = getattr(products, "name", products)
        if products is not None and products not in PRODUCTS:
            raise ValueError(f"products: expected one of {', '.join(PRODUCTS)}, got {products!r}")
        state_dtype = checks.storage(state_dtype, "state_dtype")
        if state_dtype is not None and state_dtype.itemsize != 2:
            raise ValueError(f"state_dtype: expected bfloat16 or float16, got {state_dtype.name}")
        tier = Tier(products, state_dtype)
        if dtype == jnp.float64 and tier != EXACT:
            raise ValueError("products, state_dtype: expected none beside dtype float64")
        return tier

    def judges(self, case):
        """Whether a right kernel can be told by a case: with equal keys, single products in few bits make our
        own forward err by 6 to 36 %."""
        return self.products is None or PRODUCTS[self.products][1] or case.regime != "equal_keys"

    @property
    def grids(self):
        """The throws that a yardstick has."""
        return GRIDS if self.products else GRIDS[:1]

    def __str__(self):
        """What a report adds to the candidate's dtype."""
        products = f", products {self.products}" if self.products else ""
        return products + (f", state {self.state_dtype.name}" if self.state_dtype else "")


EXACT = Tier()
GRIDS = (1.0, 1.19, 1.41)


def tiered(fn, products=None, state_dtype=None, grid=1.0):
    """fn with its products, and the state that its scan over chunks carries, rounded as a kernel's are.

    Args:
        fn: a function of arrays; `jax.vjp` inside of it is rounded, too. It is traced anew at every call, so
            `jax.jit` belongs around what is returned.
        products: one of `PRODUCTS`; None leaves products as they are.
        state_dtype: what the first float array that an outermost scan over arrays carries is rounded to: the
            state, or in a backward its cotangent. None leaves it as it is.
        grid: a number, may be traced; one of `GRIDS` is one throw of the dice of products.

    Returns:
        A function of the same arguments and results.
    """
    tier = Tier(products, state_dtype)
    if tier == EXACT:
        return fn
    multiply = products and partial(_in_parts, PRODUCTS[products], grid)

    @wraps(fn)
    def call(*args, **kwargs):
        traced, results = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        made = _run(traced, jax.tree.leaves((args, kwargs)), multiply, tier.state_dtype)
        return jax.tree.unflatten(jax.tree.structure(results), made)

    return call


@np.errstate(invalid="ignore")  # -inf - -inf, where the cumulative sum of resets is not judged
def farthest(golden, throws):
    """{name: array} as far from the golden, element by element, as the farthest of the throws."""
    if len(throws) == 1:
        return throws[0]
    errors = {name: [np.abs(made[name] - x) for made in throws] for name, x in golden.items()}
    return {name: x + np.max(errors[name], axis=0) for name, x in golden.items()}


def _run(traced, arrays, multiply, state_dtype):
    """What a traced program makes of arrays, its scans' states rounded, and its products by
    `multiply(product, x, y)`, or as they are for None."""
    jaxpr = getattr(traced, "jaxpr", traced)
    consts = getattr(traced, "consts", ())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arrays), strict=True))

    def value(x):
        return x.val if isinstance(x, Literal) else values[x]

    factors = {}
    for eqn in jaxpr.eqns:
        inputs = [value(x) for x in eqn.invars]
        if eqn.primitive.name == "mul":
            factors[eqn.outvars[0]] = inputs
        if eqn.primitive.name == "dot_general" and multiply and jnp.issubdtype(inputs[0].dtype, jnp.floating):
            # A product with a vector of ones is a sum of x y.
            x_y = factors.get(eqn.invars[0]) if inputs[1].ndim == 1 else None
            made = [_product(eqn, *inputs, x_y, multiply)]
        else:
            made = _run_one(eqn, inputs, multiply, state_dtype)
        values.update(zip(eqn.outvars, made, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _product(eqn, x, y, factors, multiply):
    def product(x, y):
        return eqn.primitive.bind(x, y, **eqn.params)

    return multiply(product, x, y) if factors is None else product(multiply(jnp.multiply, *factors), y)


def _in_parts(how, grid, product, x, y):
    """The product of x and y, each rounded, or each the sum of two rounded parts."""
    bits, in_three = how
    x_high, y_high = (_of_bits(z, bits, grid) for z in (x, y))
    if not in_three:
        return product(x_high, y_high)
    # Of what is not finite there is no rest.
    x_low, y_low = (
        _of_bits(jnp.where(jnp.isfinite(high), z - high, 0), bits, grid)
        for z, high in ((x, x_high), (y, y_high))
    )
    return product(x_low, y_high) + product(x_high, y_low) + product(x_high, y_high)


def _of_bits(x, bits, grid):
    """x with a mantissa of so many bits, of float32's range, on a grid that goes through x where 1.0 does."""

    def rounded(x):
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits)

    return jnp.where(rounded(x) == x, x, rounded(grid * x) / grid)


CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def _run_one(eqn, arrays, multiply, state_dtype):
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(eqn, arrays, multiply, state_dtype)
    if name == "while":
        return _while(params, arrays, multiply)
    if name == "cond":
        index, *arrays = arrays
        branches = [
            lambda *x, branch=branch: _run(branch, x, multiply, state_dtype) for branch in params["branches"]
        ]
        # A branch for each platform makes the same on all.
        return (
            branches[-1](*arrays)
            if params.get("branches_platforms")
            else lax.switch(index, branches, *arrays)
        )
    if name in CALLS:
        return _run(params[CALLS[name]], arrays, multiply, state_dtype)
    made = eqn.primitive.bind(*arrays, **params)
    return made if eqn.primitive.multiple_results else [made]


def _scan(eqn, arrays, multiply, state_dtype):
    """The parameters that count constants and carries have other names in other versions of JAX: what is
    sliced has one axis less inside. A loop over numbers slices nothing."""
    body, params = eqn.params["jaxpr"], eqn.params
    jaxpr = getattr(body, "jaxpr", body)
    n_whole = sum(x.aval.ndim == y.aval.ndim for x, y in zip(eqn.invars, jaxpr.invars, strict=True))
    n_carry = sum(x.aval.ndim == y.aval.ndim for x, y in zip(eqn.outvars, jaxpr.outvars, strict=True))
    consts, carry, xs = arrays[: n_whole - n_carry], arrays[n_whole - n_carry : n_whole], arrays[n_whole:]
    is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in carry]
    state = is_float.index(True) if state_dtype is not None and xs and any(is_float) else None

    def stored(carry):
        return [_rounded(x, state_dtype) if i == state else x for i, x in enumerate(carry)]

    def step(carry, xs):
        made = _run(body, [*consts, *carry, *xs], multiply, None)
        return stored(made[:n_carry]), made[n_carry:]

    how = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, stored(carry), xs, **how)
    return [*carry, *ys]


def _while(params, arrays, multiply):
    n, m = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, carry = arrays[:n], arrays[n : n + m], arrays[n + m :]
    return lax.while_loop(
        lambda carry: _run(params["cond_jaxpr"], [*cond_consts, *carry], multiply, None)[0],
        lambda carry: _run(params["body_jaxpr"], [*body_consts, *carry], multiply, None),
        list(carry),
    )


def _rounded(x, dtype):
    """x rounded to a dtype, in its own."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=int(info.nexp), mantissa_bits=int(info.nmant))
