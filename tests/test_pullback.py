"""A gradient is the function that was given for it; all else that JAX makes of a function is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tops.cpu.kda.pullback import with_pullback

pytestmark = pytest.mark.unoptimized
X = np.array([0.5, -2.0, 3.0])
Y = np.array([1.5, 0.25, -1.0])
PULLED = []


def f(index, x, y):
    return dict(product=x**index * y, other=None)


def keep(index, x, y):
    return f(index, x, y), x**2


def pull(index, args, kept, cotangents, wanted):
    """With what `keep` kept, and not with f."""
    PULLED.append(wanted)
    (x, y), ct = args, cotangents["product"]
    return index * kept * y * ct, x * kept * ct


def op(x, y):
    return with_pullback(f, keep, pull)(np.int32(3), x, y)["product"]


def plain(x, y):
    return f(3, x, y)["product"]


def total(f):
    return lambda x, y: jnp.sum(f(x, y))


def scanned(f):
    return lambda x, y: jax.lax.scan(lambda carry, row: (carry + f(*row), None), 0.0, (x, y))[0]


def over_first(f):
    return lambda x, y: jax.vmap(lambda x: f(x, y[1]))(x)


# Whether the gradient that is asked for is `pull`'s, and not JAX's own of f.
OWN = {
    "gradient": (lambda f: jax.grad(total(f), (0, 1)), True),
    "of one argument": (lambda f: jax.grad(total(f), 1), True),
    "jitted": (lambda f: jax.jit(jax.grad(total(jax.jit(f)), (0, 1))), True),
    "rematerialised": (lambda f: jax.grad(total(jax.checkpoint(f)), (0, 1)), True),
    "vmap of gradients": (lambda f: jax.vmap(jax.grad(f, (0, 1))), True),
    "gradient of a scan": (lambda f: jax.grad(total(scanned(f)), (0, 1)), True),
    "tangent": (lambda f: lambda x, y: jax.jvp(f, (x, y), (y, x))[1], False),
    "gradient of a vmap": (lambda f: jax.grad(total(jax.vmap(f)), (0, 1)), True),
    "gradient of a vmap of one argument": (lambda f: jax.grad(total(over_first(f)), (0, 1)), True),
    "tangent of a vmap": (lambda f: lambda x, y: jax.jvp(jax.vmap(f), (x, y), (y, x))[1], False),
    "gradient of a tangent": (
        lambda f: jax.grad(total(lambda x, y: jax.jvp(f, (x, y), (y, x))[1]), (0, 1)),
        False,
    ),
    "tangent of a gradient": (
        lambda f: lambda x, y: jax.jvp(jax.grad(total(f), (0, 1)), (x, y), (y, x))[1],
        True,
    ),
    "second gradient": (lambda f: jax.grad(total(jax.grad(total(f), 1)), (0, 1)), True),
}


@pytest.mark.parametrize("name", OWN)
def test_each_transformation(name):
    transform, own = OWN[name]
    PULLED.clear()
    made = transform(op)(X, Y)
    assert bool(PULLED) == own
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-14), made, transform(plain)(X, Y))


def test_nothing_is_kept_where_nothing_is_differentiated():
    np.testing.assert_array_equal(with_pullback(f, None, None)(np.int32(3), X, Y)["product"], plain(X, Y))


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)])
def test_what_is_wanted(argnums):
    PULLED.clear()
    jax.jit(jax.grad(total(op), argnums))(X, Y)
    (wanted,) = PULLED
    assert wanted == tuple(i in argnums for i in range(2))
