"""A kernel that rounds the operands of its products, or its state, is held to a yardstick that does so, too.

The kernels are chunked KDA in NumPy, rounded by its bits. In its own tier a kernel is within the kit's
multiple, 2; without the tier it is flagged.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tops.cpu.kda import naive_chunk_kda
from tops.cpu.kda.testing import CATALOGUE, check
from tops.cpu.kda.testing.__main__ import main
from tops.cpu.kda.testing.files import check_files, export
from tops.cpu.kda.testing.tiers import GRIDS, PRODUCTS, Tier, tiered

pytestmark = pytest.mark.unoptimized
slow, long = pytest.mark.slow, pytest.mark.long


def rounded(x, bits):
    """x in float32 with a mantissa of so many bits, to nearest even."""
    dropped = 23 - bits
    integers = x.astype(np.float32).view(np.uint32)
    integers = integers + (1 << dropped - 1) - 1 + (integers >> dropped & 1)
    return (integers >> dropped << dropped).astype(np.uint32).view(np.float32)


def exact(x, y):
    return x @ y


def in_one(bits):
    return lambda x, y: rounded(x, bits) @ rounded(y, bits)


def in_three(bits):
    def product(x, y):
        (x, x_rest), (y, y_rest) = ((rounded(z, bits), rounded(z - rounded(z, bits), bits)) for z in (x, y))
        return x @ y + (x_rest @ y + x @ y_rest)

    return product


KERNELS = {
    "TF32_TF32_F32": in_one(10),
    "BF16_BF16_F32": in_one(7),
    "BF16_BF16_F32_X3": in_three(7),
}


def chunk_kda(product=exact, state_dtype=np.float32):
    """A kernel in float32 by FLA's stages, from cumulative sums of the gates."""

    def kernel(*, q, k, v, g, beta, scale, initial_state=None, output_final_state=False):
        (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
        o, states = np.zeros_like(v), np.zeros((B, HV, K, V), np.float32)
        if initial_state is not None:
            states += initial_state
        for row, head in np.ndindex(B, HV):
            S = states[row, head].astype(state_dtype).astype(np.float32)
            for start in range(0, T, 64):
                tokens = row, slice(start, start + 64)
                of_k_head = (x[tokens][:, head // (HV // H)] for x in (q, k))
                of_head = (x[tokens][:, head] for x in (v, g, beta))
                o[tokens][:, head], S = chunk(S, *of_k_head, *of_head, scale, product)
                S = S.astype(state_dtype).astype(np.float32)
            states[row, head] = S
        return o, states if output_final_state else None

    return kernel


def chunk(S, q, k, v, g, beta, scale, product):
    G, n = np.cumsum(g, axis=0, dtype=np.float32), len(q)
    Aqk, A = np.zeros((2, n, n), np.float32)
    for i in range(0, n, 16):  # the decays of 16 rows, from and to the middle of them
        rows, so_far, middle = slice(i, i + 16), slice(i + 16), G[min(i + 8, n - 1)]
        from_middle, to_middle = np.exp(G[rows] - middle), np.exp(middle - G[so_far])
        Aqk[rows, so_far] = product(q[rows] * from_middle, (k[so_far] * to_middle).T)
        A[rows, so_far] = product(k[rows] * from_middle, (k[so_far] * to_middle).T)
    L, Akk = beta[:, None] * np.tril(A, -1), np.eye(n, dtype=np.float32)
    for i in range(n):
        Akk[i] -= L[i, :i] @ Akk[:i]
    w = product(Akk, beta[:, None] * k * np.exp(G))
    v_new = product(Akk, beta[:, None] * v) - product(w, S)
    o = scale * (product(q * np.exp(G), S) + product(np.tril(Aqk), v_new))
    return o, np.exp(G[-1])[:, None] * S + product((k * np.exp(G[-1] - G)).T, v_new)


ALL = "dense,weak,no_decay,uneven,near_keys,beta_0_1,beta_2,equal_keys,large_state,one_token"
HOW = dict(adapter="plain,unpacked", arrays="numpy")


def assert_told_by_its_tier(kernel, cases, **tier):
    report = check(kernel, cases, **HOW, **tier)
    assert report.ok, str(report)
    assert re.search("in float32, (products|state) \\w+, at most", report.verdict)
    off = {row.case for row in check(kernel, cases, **HOW).rows if not row.ok}
    if tier.get("products", "").endswith("X3"):  # of few ulp where no error lives on
        assert off >= {"weak", "beta_2", "equal_keys"} & {row.case for row in report.rows}
    else:
        assert off == {row.case for row in report.rows}


@pytest.mark.parametrize(
    ("products", "cases"),
    [("TF32_TF32_F32", "dense"), *(pytest.param(name, ALL, marks=[slow, long]) for name in PRODUCTS)],
)
def test_rounded_products(products, cases):
    cases = cases if products.endswith("X3") else cases.replace("equal_keys,", "")
    assert_told_by_its_tier(chunk_kda(KERNELS[products]), cases, products=products)


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [
        ("bfloat16", "dense"),
        pytest.param("bfloat16", ALL, marks=[slow, long]),
        pytest.param("float16", ALL.replace("equal_keys,", ""), marks=[slow, long]),
    ],
)
def test_a_state_in_16_bits(dtype, cases):
    assert_told_by_its_tier(chunk_kda(state_dtype=jnp.dtype(dtype)), cases, state_dtype=dtype)


@slow
def test_exact_kernels_pass_all_the_same():
    report = check(chunk_kda(), ALL, **HOW)
    assert report.ok, str(report)


def test_equal_keys_are_not_judged_in_a_single_product():
    cases = [case for case in CATALOGUE.values() if case.regime == "equal_keys"]
    assert cases
    for products in PRODUCTS:
        tier = Tier.of(products, None, np.dtype(np.float32))
        assert all(tier.judges(case) == products.endswith("X3") for case in cases)
    assert Tier.of(jax.lax.DotAlgorithmPreset.TF32_TF32_F32, None, None).products == "TF32_TF32_F32"
    assert not check(chunk_kda(), cases, products="BF16_BF16_F32", **HOW).rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(products="F32_F32_F32"), "products: expected one of TF32_TF32_F32, .*, got 'F32_F32_F32'"),
        (dict(state_dtype="float32"), "state_dtype: expected bfloat16 or float16, got float32"),
        (dict(dtype="float64", state_dtype="float16"), "expected none beside dtype float64"),
    ],
)
def test_there_is_no_such_tier(options, message):
    with pytest.raises(ValueError, match=message):
        check(chunk_kda(), "dense", **options)


tf32 = chunk_kda(KERNELS["TF32_TF32_F32"])


def test_command_line():
    command = ["check", "test_tiers:tf32", "--case", "dense", "--adapter", "plain", "--arrays", "numpy"]
    assert main(command) == 1
    assert main([*command, "--products", "TF32_TF32_F32"]) == 0


def test_files(tmp_path):
    golden, made = tmp_path / "golden", tmp_path / "made"
    made.mkdir()
    export(golden, [CATALOGUE["dense"]], ["float32"])
    with np.load(golden / "dense.float32.npz") as file:
        inputs = {name[6:]: file[name] for name in file.files if name.startswith("input.")}
    o, final_state = tf32(**inputs, scale=32**-0.5, output_final_state=True)
    np.savez(made / "dense.float32.npz", o=o, final_state=final_state)
    assert not check_files(golden, made).ok
    report = check_files(golden, made, products="TF32_TF32_F32")
    assert report.ok, str(report)
    assert "float32, products TF32_TF32_F32" in report.verdict
    command = ["check-files", str(golden), str(made)]
    assert main([*command, "--products", "TF32_TF32_F32"]) == 0


@jax.custom_jvp
def with_rule(x, y):
    return product_of(x, y)


with_rule.defjvp(lambda primals, tangents: (product_of(*primals), product_of(*tangents)))


def product_of(x, y):
    """[n, 1] by [1, n]: a product without a sum, so that what was rounded shows to the bit."""
    return jnp.matmul(x, y, precision="highest")


def in_scan(x, y):
    return jax.lax.scan(lambda carry, row: (carry, product_of(row[None], y)[0]), 0.0, x)[1]


def in_while(x, y):
    return jax.lax.while_loop(lambda z: z[0] < 1, lambda z: (z[0] + 1, product_of(x, y)), (0, x * y))[1]


PLACES = {
    "jit": jax.jit(product_of),
    "scan": in_scan,
    "while": in_while,
    "fori": lambda x, y: jax.lax.fori_loop(0, 1, lambda i, z: product_of(x, y), x * y),
    "cond": lambda x, y: jax.lax.cond(x[0, 0] > 9, lambda x, y: x * y, product_of, x, y),
    "platform": lambda x, y: jax.lax.platform_dependent(x, y, cpu=product_of, default=product_of),
    "custom_jvp": with_rule,
    "checkpoint": jax.checkpoint(product_of),
    "gradient": lambda x, y: jax.vjp(lambda z: jnp.matmul(z, y.T), x * y)[1](x)[0],
    "vmap": lambda x, y: jax.vmap(product_of, in_axes=(0, None))(x[:, None], y)[:, 0],
    "sum": lambda x, y: jnp.einsum("ijk,k->ij", x[..., None] * y[..., None], jnp.ones(1, x.dtype)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("products", PRODUCTS)
def test_products_are_rounded_wherever_they_are(place, products):
    x, y = np.random.default_rng(0).standard_normal((2, 7)).astype(np.float32)
    x, y = x[:, None], y[None]
    made = jax.jit(tiered(PLACES[place], products))(x, y)
    expected = KERNELS[products](x, y)
    if products.endswith("X3"):  # the order of its sum is the compiler's
        np.testing.assert_allclose(made, expected, rtol=2**-22)
    else:
        np.testing.assert_array_equal(made, expected)
    assert (np.asarray(made) != x * y).any()


def test_other_grids_are_as_fine():
    """Each throw errs by at most half a unit, they differ, and what needs no rounding has none."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1000, 1)).astype(np.float32), np.ones((1, 1), np.float32)
    throw = jax.jit(lambda x, grid: tiered(product_of, "TF32_TF32_F32", None, grid)(x, y))
    errors = np.array([(throw(x, grid) - x) / x for grid in GRIDS])
    assert np.abs(errors).max() <= 2**-11 * (1 + 1e-3)
    assert np.abs(np.corrcoef(errors[..., 0]) - np.eye(len(GRIDS))).max() < 0.2
    short = rounded(x, 10)
    assert all((throw(short, grid) == short).all() for grid in GRIDS)


def test_the_state_is_what_the_outermost_scan_over_arrays_carries_first():
    x = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)

    def sums(x):
        def step(carry, row):
            i, state, other = carry
            inner = jax.lax.scan(lambda a, b: (a + b, a), 0.0, row)[0]
            return (i + 1, state + row, other + row), inner

        looped = jax.lax.fori_loop(0, len(x), lambda i, total: total + x[i], 0 * x[0])
        return *jax.lax.scan(step, (0, x[0], x[0]), x), looped

    (n, state, other), inner, looped = jax.jit(tiered(sums, None, np.dtype(jnp.bfloat16)))(x)
    (_, _, other_true), inner_true, looped_true = jax.jit(sums)(x)
    expected = x[0].astype(jnp.bfloat16)
    for row in x:
        expected = (expected.astype(np.float32) + row).astype(jnp.bfloat16)
    assert n == 20
    np.testing.assert_array_equal(state, expected.astype(np.float32))
    for found, exact in ((other, other_true), (inner, inner_true), (looped, looped_true)):
        np.testing.assert_array_equal(found, exact)


@slow
@long
@pytest.mark.parametrize("tier", [dict(products="TF32_TF32_F32"), dict(state_dtype="bfloat16")], ids=str)
def test_a_gradient_has_a_tier_too(tier):
    """That of `naive_chunk_kda`, which shares no code with the yardstick, forward and backward rounded."""
    rounded = partial(tiered, **tier | dict(state_dtype=tier.get("state_dtype") and jnp.dtype("bfloat16")))

    def kernel(q, k, v, g, beta, initial_state, scale, output_final_state):
        def forward(*inputs):
            return naive_chunk_kda(*inputs[:5], scale, inputs[5], output_final_state=True)

        @jax.custom_vjp
        def op(*inputs):
            return jax.jit(rounded(forward))(*inputs)

        @jax.jit
        @rounded
        def backward(inputs, cotangents):
            return jax.vjp(forward, *inputs)[1](cotangents)

        op.defvjp(lambda *inputs: (op(*inputs), inputs), backward)
        return op(q, k, v, g, beta, initial_state)

    how = dict(gradients=True, adapter="plain,unpacked")
    report = check(kernel, "dense,weak", **how, **tier)
    assert report.ok, str(report)
    assert not any(row.ok for row in check(kernel, "dense,weak", **how).rows)
