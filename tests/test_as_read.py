"""Only what is read is computed, and it is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gradients import LAYOUTS, case

from tops.cpu.kda import chunk_fwd, chunk_kda
from tops.cpu.kda.as_read import as_read

X = np.float32([0.5, 2.0])
TRACED = []


@as_read
def powers(x, *, fields):
    TRACED.append(fields)
    return x, {field: x ** int(field) for field in fields}


def traced(f, *arguments):
    """The fields of `powers` that are computed in the compiled f, and what f returns."""
    compiled = jax.jit(f).trace(*arguments)
    TRACED.clear()
    compiled = compiled.lower().compile()
    return {field for fields in TRACED for field in fields}, compiled(*arguments)


@pytest.mark.parametrize("read", [(), ("2",), ("3",), ("2", "3")])
def test_what_is_read_is_computed(read):
    def f(x):
        first, made = powers(x, fields=("2", "3"))
        return first, [made[field] for field in read]

    fields, (first, made) = traced(f, X)
    assert fields == set(read)
    np.testing.assert_array_equal(first, X)
    np.testing.assert_allclose(made, [X ** int(field) for field in read], rtol=1e-6)


def test_nothing_is_computed_of_what_nobody_reads():
    fields, _ = traced(lambda x: (powers(x, fields=("2",)), 2 * x)[1], X)
    assert fields == set()


def test_each_transformation_is_that_of_the_function():
    def cube(x):
        return powers(x, fields=("2", "3"))[1]["3"]

    np.testing.assert_allclose(cube(X), X**3, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(cube)(X), X**3, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(cube, (X,), (2 * X,))[1], 6 * X**3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: jax.vmap(cube)(x).sum())(X), 3 * X**2, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(jax.grad(cube)))(X), 6 * X, rtol=1e-6)


@pytest.mark.parametrize("storage_dtype", [None, jnp.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_passes_the_state_on_without_q(layout, storage_dtype, monkeypatch):
    """Beside o the same gradient, in float64 to rounding; without it, what makes the states looks at no q.
    Where they are rounded as in FLA's kernels, nothing is traced anew."""
    arguments, options, cotangents = case(layout=layout)
    options["storage_dtype"] = storage_dtype
    passes = []
    intra = chunk_fwd.intra
    monkeypatch.setattr(chunk_fwd, "intra", lambda q, *rest: passes.append(q is not None) or intra(q, *rest))

    def op(arguments):
        return chunk_kda(**arguments, output_final_state=True, **options)

    def gradient(*, beside):
        def f(arguments):
            results, pull = jax.vjp(op, arguments)
            return pull(cotangents)[0], results if beside else None

        jax.clear_caches()
        traced = jax.jit(f).trace(arguments)
        passes.clear()
        lowered = traced.lower()
        return list(passes), lowered.compile()(arguments)

    with_o, (beside, (o, final_state)) = gradient(beside=True)
    without_o, (alone, _) = gradient(beside=False)
    assert (with_o, without_o) == (([True], [False]) if storage_dtype is None else ([], []))
    for name, x in alone.items():
        np.testing.assert_allclose(x, beside[name], rtol=0, atol=1e-13 * jnp.abs(x).max(), err_msg=name)
    plain = op(arguments)
    np.testing.assert_array_equal(o, plain[0])
    np.testing.assert_array_equal(final_state, plain[1])
