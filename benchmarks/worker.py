"""One library in one process: prepares cases, then times a case whenever it is told to.

Speaks JSON, one object a line: {"prepare": name, ...the case} is answered with the seconds that tracing,
lowering and compiling took and the bytes of the temporaries, {"time": name} with the seconds of a call,
{"drop": name} with nothing but ok.
"""

import json
import sys
import time
from functools import partial
from statistics import median

import numpy as np

LOWER_BOUND = -5.0  # of raw gates, for both libraries that take them


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


def arguments(
    T=0, H=0, documents=None, tokens=None, shape=None, gradient=None, compile_only=False, heads_first=False
):
    """The arrays of a call, then its optional ones by name; views of one token where only shapes count."""
    if shape is not None:
        return [np.ones(shape, np.float32)], {}
    if tokens is not None:  # decoding: so many sequences of one token
        states = np.ones((tokens, H, 128, 128), np.float32)
        return inputs(tokens, H), dict(initial_state=states, cu_seqlens=np.arange(tokens + 1, dtype=np.int32))
    arrays = inputs(1 if compile_only else T, H)
    if compile_only:
        arrays = [np.broadcast_to(x, (1, T, *x.shape[2:])) for x in arrays]
    if heads_first:
        arrays = [np.moveaxis(x, 2, 0) for x in arrays]
    if gradient:  # of o and of the final state
        arrays = *arrays, arrays[2], np.ones((documents or 1, H, 128, 128), np.float32)
    return arrays, dict(cu_seqlens=cu_seqlens_of(T, documents)) if documents else {}


def tops_ops():
    from jax import numpy as jnp

    from tops.cpu import kda

    return dict(
        chunk_kda=kda.chunk_kda,
        raw_gates=partial(kda.chunk_kda, use_gate_in_kernel=True, lower_bound=LOWER_BOUND),
        chunk_kda_fwd=kda.chunk_kda_fwd,
        recurrence=kda.naive_recurrent_kda,
        decode=kda.fused_recurrent_kda,
        dot=lambda x, **_: jnp.dot(x, x, precision="highest"),
        touch=lambda x, **_: 0.5 * x,
    )


def jla_ops():
    from jla.ops.chunked import kda as chunked
    from jla.ops.reference import kda as scan

    return dict(chunked=chunked, scan=scan)


def tokamax_ops():
    """Both with raw gates, since xla_chunked takes no others, and in chunks of 64, since it has no others."""
    from jax import numpy as jnp
    from tokamax._src.ops.kda.api import kimi_delta_attention

    def op(*arrays, **options):
        options |= dict(a_log=jnp.zeros(len(arrays[0])), use_gate_in_kernel=True, lower_bound=LOWER_BOUND)
        o, final_state = kimi_delta_attention(*arrays, **options)
        return o, final_state[:, 0]  # of the only segment

    return {name: partial(op, implementation=name) for name in ("xla", "xla_chunked")}


class Jax:
    """Functions of JAX arrays, compiled ahead of time."""

    def __init__(self, library):
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # a compilation is timed, not a read file
        self.jax = jax
        self.version = f"JAX {jax.__version__}"
        self.ops = dict(tops=tops_ops, jla=jla_ops, tokamax=tokamax_ops)[library]()
        self.heads_first = library == "tokamax"

    def gradient(self, op, kind):
        """The gradients of all arguments of `op`, for cotangents of o and the final state that come last.

        Beside its results is what training computes, where the loss reads o. Alone, nobody does, and XLA
        leaves out of the forward what only o needs.
        """

        def gradient(*arrays, **options):
            *arrays, o, final_state = arrays
            results, pull = self.jax.vjp(lambda *arrays: op(*arrays, **options), *arrays)
            gradients = pull((o, final_state))
            return {"alone": gradients, "beside results": (results, gradients)}[kind]

        return gradient

    def prepare(self, op, dtype="float32", gradient=None, compile_only=False, **case):
        jax, jnp = self.jax, self.jax.numpy
        arrays, options = arguments(
            gradient=gradient, compile_only=compile_only, heads_first=self.heads_first, **case
        )
        if compile_only:
            arrays = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays]
        else:
            arrays = [jnp.asarray(x, dtype) for x in arrays]
        options = {name: jnp.asarray(value) for name, value in options.items()}
        op = self.gradient(self.ops[op], gradient) if gradient else self.ops[op]
        start = time.perf_counter()
        function = jax.jit(lambda arrays, options: op(*arrays, **options, output_final_state=True))
        compiled = function.lower(arrays, options).compile()
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
