"""One library in one process: prepares cases, then times a case whenever it is told to.

Speaks JSON, one object a line: {"prepare": name, ...the case} is answered with what compiling it cost,
{"time": name} with the seconds of a call, {"drop": name} with nothing but ok.
"""

import json
import sys
import time
from statistics import median

import numpy as np


def inputs(T, H, K=128, V=128, seed=0):
    """q, k, v, g, beta of one row in float32, as a model draws them."""
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((1, T, H, K), dtype=np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = rng.standard_normal((1, T, H, V), dtype=np.float32)
    g = -np.logaddexp(0, -rng.standard_normal((1, T, H, K), dtype=np.float32))
    beta = 1 / (1 + np.exp(-rng.standard_normal((1, T, H), dtype=np.float32)))
    return q, k, v, g, beta


def cu_seqlens_of(T, N):
    """cu_seqlens of N documents of uneven lengths that fill T tokens."""
    cuts = np.random.default_rng(0).choice(np.arange(1, T), N - 1, replace=False)
    return np.array([0, *sorted(cuts), T], np.int32)


class Jax:
    """Functions of JAX arrays, compiled ahead of time."""

    def __init__(self, library):
        import jax

        self.jax = jax
        self.version = f"JAX {jax.__version__}"
        if library == "jla":
            from jla.ops.chunked import kda as jla_chunked
            from jla.ops.reference import kda as jla_scan

            self.ops = dict(chunked=jla_chunked, scan=jla_scan)
        else:
            from tops.cpu import kda

            self.ops = dict(
                chunk_kda=kda.chunk_kda,
                chunk_kda_fwd=kda.chunk_kda_fwd,
                recurrence=kda.naive_recurrent_kda,
                decode=kda.fused_recurrent_kda,
                gradient=self.gradient(kda.chunk_kda),
                dot=lambda x, **_: jax.numpy.dot(x, x, precision="highest"),
                touch=lambda x, **_: 0.5 * x,
            )

    def gradient(self, op):
        """The gradients of all arguments of `op`, for cotangents of o and the final state that come last."""

        def gradient(*arrays, **options):
            *arrays, o, final_state = arrays
            _, pull = self.jax.vjp(lambda *arrays: op(*arrays, **options), *arrays)
            return pull((o, final_state))

        return gradient

    def prepare(
        self, op, T=0, H=0, documents=None, tokens=None, dtype="float32", shape=None, compile_only=False
    ):
        jax, jnp = self.jax, self.jax.numpy
        options = dict(output_final_state=True)
        if shape is not None:
            arrays = [np.ones(shape, np.float32)]
        elif tokens is not None:  # decoding: so many sequences of one token
            arrays = inputs(tokens, H)
            options["initial_state"] = np.ones((tokens, H, 128, 128), np.float32)
            options["cu_seqlens"] = np.arange(tokens + 1, dtype=np.int32)
        else:
            arrays = inputs(64, H) if compile_only else inputs(T, H)
            if documents:
                options["cu_seqlens"] = cu_seqlens_of(T, documents)
        if op == "gradient":
            arrays = *arrays, arrays[2], np.ones((documents or 1, H, 128, 128), np.float32)
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        if compile_only:
            arrays = [jax.ShapeDtypeStruct((1, T, *x.shape[2:]), x.dtype) for x in arrays]
        flags = {name: value for name, value in options.items() if isinstance(value, bool)}
        options = {name: jnp.asarray(value) for name, value in options.items() if name not in flags}
        start = time.perf_counter()
        compiled = jax.jit(lambda arrays, options: self.ops[op](*arrays, **options, **flags))
        compiled = compiled.lower(arrays, options).compile()
        cost = dict(compile=time.perf_counter() - start)
        cost["temporaries"] = compiled.memory_analysis().temp_size_in_bytes
        return (lambda: jax.block_until_ready(compiled(arrays, options))), cost


class Torch:
    """FLA's chunked form in plain PyTorch."""

    def __init__(self, library):
        import torch
        from fla.ops.kda.naive import naive_chunk_kda

        self.torch, self.op = torch, naive_chunk_kda
        self.version = f"PyTorch {torch.__version__}"

    def prepare(self, op, T, H):
        arrays = [self.torch.from_numpy(x) for x in inputs(T, H)]

        def call():
            with self.torch.no_grad():
                self.op(*arrays, output_final_state=True, chunk_size=64)

        return call, {}


def main(library):
    worker = Torch(library) if library == "fla" else Jax(library)
    reply(dict(version=f"Python {sys.version.split()[0]}, {worker.version}"))
    calls = {}
    for line in sys.stdin:
        message = json.loads(line)
        if "prepare" in message:
            name = message.pop("prepare")
            call, cost = worker.prepare(**message)
            if not message.get("compile_only"):
                calls[name] = call
                call()
            reply(cost)
        elif "time" in message:
            reply(dict(seconds=seconds_of(calls[message["time"]])))
        else:
            del calls[message["drop"]]
            reply({})


def seconds_of(call):
    """The median of as many calls as half a second holds, at least one, after one that does not count: the
    first after a rest takes a fifth longer for us, and twice the time for jla."""
    call()
    seconds = []
    while sum(seconds) < 0.5:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def reply(message):
    print("reply", json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
