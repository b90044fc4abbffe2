"""The demo: a Kimi-Linear layer's forward on packed documents, timed and judged by a float64 recurrence."""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from . import chunk_kda, naive_recurrent_kda

K = V = 128  # the head of a Kimi-Linear layer
ROUNDS = 5
ORACLE_HEADS = 4  # heads a step of the oracle: its progress is shown between steps


def main():
    args = parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # for the oracle; every array below states its dtype
    *inputs, cu_seqlens = draw(args)

    def forward(q, k, v, g, beta, cu_seqlens):
        return chunk_kda(
            q, k, v, g, beta, output_final_state=True, cu_seqlens=cu_seqlens, chunk_size=args.chunk_size
        )

    say("compiling chunk_kda")
    start = time.perf_counter()
    compiled = jax.jit(forward).lower(*inputs, cu_seqlens).compile()
    compile_time = time.perf_counter() - start
    jax.block_until_ready(compiled(*inputs, cu_seqlens))
    times = []
    for i in range(ROUNDS):
        say(f"timing chunk_kda, round {i + 1} of {ROUNDS}")
        start = time.perf_counter()
        o, state = jax.block_until_ready(compiled(*inputs, cu_seqlens))
        times.append(time.perf_counter() - start)
    o_true, state_true = oracle(inputs, cu_seqlens)
    say("")

    time_taken = statistics.median(times)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    rounded = o_true.astype(args.dtype)
    rows = [
        ("layer", f"H={args.heads}, K=V={K}, {args.dtype}, chunk size {args.chunk_size}"),
        ("tokens", f"{args.tokens} in {args.documents} documents of {shortest_longest(cu_seqlens)}"),
        ("time", f"{time_taken:.3f} s (median of {ROUNDS}; compiled in {compile_time:.1f} s)"),
        ("tokens/s", f"{args.tokens / time_taken:,.0f}"),
        ("temporary memory", f"{temporaries / 1e6:.1f} MB"),
        (
            "error of o",
            f"{error(o, o_true):.1e} (rounding to {args.dtype} alone: {error(rounded, o_true):.1e})",
        ),
        ("error of the final state", f"{error(state, state_true):.1e} ({state.dtype})"),
    ]
    print(f"chunk_kda on JAX {jax.__version__}; errors are relative (Frobenius), against the float64 oracle")
    for name, value in rows:
        print(f"  {name:26}{value}")


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m tops.cpu.kda", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--documents", type=int, default=25)
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--chunk-size", type=int, choices=[16, 32, 64, 128], default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("tokens", "heads", "documents"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.documents > args.tokens:
        parser.error(f"--documents: expected at most --tokens={args.tokens}, got {args.documents}")
    if args.seed < 0:
        parser.error(f"--seed: expected at least 0, got {args.seed}")
    return args


def draw(args):
    """q, k (unit norm), v, g (logsigmoid of a normal), beta (sigmoid of a normal), and cu_seqlens."""
    say("drawing the inputs")
    rng = np.random.default_rng(args.seed)
    T, H = args.tokens, args.heads
    q, k, v, gate = (rng.standard_normal((1, T, H, K), np.float32) for _ in range(4))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = 1 / (1 + np.exp(-rng.standard_normal((1, T, H), np.float32)))
    ends = np.sort(rng.choice(np.arange(1, T), args.documents - 1, replace=False))
    cu_seqlens = np.concatenate([[0], ends, [T]]).astype(np.int32)
    return *(jnp.asarray(x, args.dtype) for x in (q, k, v, -np.logaddexp(0, -gate), beta)), cu_seqlens


def oracle(inputs, cu_seqlens):
    """o and the final state by the recurrence in float64, a few heads at a time."""
    parts = []
    H = inputs[0].shape[2]
    for head in range(0, H, ORACLE_HEADS):
        say(f"the oracle, token by token in float64: {head} of {H} heads")
        part = (x[:, :, head : head + ORACLE_HEADS].astype(jnp.float64) for x in inputs)
        parts.append(naive_recurrent_kda(*part, output_final_state=True, cu_seqlens=cu_seqlens))
    o, state = zip(*parts, strict=True)
    return jnp.concatenate(o, axis=2), jnp.concatenate(state, axis=1)


def error(x, truth):
    return float(jnp.linalg.norm(x.astype(jnp.float64) - truth) / jnp.linalg.norm(truth))


def shortest_longest(cu_seqlens):
    lengths = np.diff(cu_seqlens)
    return f"{lengths.min()} to {lengths.max()}"


def say(text):
    """Progress, on one line that the next call overwrites."""
    print(f"\r{text:70}", end="" if text else "\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
