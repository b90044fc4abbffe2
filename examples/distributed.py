"""One packed sequence over several processes: `context_parallel_kda` under `jax.distributed`, on loopback.

    python examples/distributed.py [--tokens 4096] [--heads 4]

Starts as many processes as a row of its table says, judges what they return by `chunk_kda` on one device, and
compares its bits with those of one process that has as many devices.
"""

import argparse
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LAYOUTS = ((1, 2), (2, 2), (1, 4), (4, 4))  # processes, devices of all of them together


def main():
    args = parse_args()
    if args.rank is not None:
        worker(args)
        return
    print("processes  devices   tokens  error against one device  bytes to a device  bits of one process")
    expected = one_device(args)
    one_process = {}
    for processes, devices in LAYOUTS:
        o, states, received = launch(args, processes, devices)
        error = max(relative_error(x, y) for x, y in zip((o, states), expected, strict=True))
        bits = one_process.setdefault(devices, (o, states))
        same = all(np.array_equal(x, y) for x, y in zip((o, states), bits, strict=True))
        print(
            f"{processes:9}{devices:9}{args.tokens:9}{error:26.1e}{received:19,}"
            f"{'-' if processes == 1 else 'the same' if same else 'other':>21}",
            flush=True,
        )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 4")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64, help="K and V")
    for name in ("rank", "processes", "devices", "port"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens < 4 or args.tokens % 4:
        parser.error(f"--tokens: expected a multiple of 4, got {args.tokens}")
    return args


def launch(args, processes, devices):
    """(o, final states, bytes that a device receives) of one run."""
    with tempfile.TemporaryDirectory() as out, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        options = dict(
            tokens=args.tokens,
            heads=args.heads,
            dim=args.dim,
            processes=processes,
            devices=devices,
            port=port,
        )
        options = [f"--{name}={value}" for name, value in options.items()]
        # No host in the environment may stand between processes on loopback.
        environment = {name: x for name, x in os.environ.items() if not name.lower().endswith("_proxy")}
        # Gloo greets its peers on stdout.
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, *options, f"--rank={rank}", f"--out={out}"],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            for rank in range(processes)
        ]
        try:
            codes = [worker.wait(timeout=300) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        if any(codes):
            sys.exit(f"the workers ended with {codes}")
        parts = [np.load(Path(out) / f"{rank}.npz") for rank in range(processes)]
        o = np.concatenate([part["o"] for part in parts], axis=1)
        return o, parts[0]["states"], int(parts[0]["received"])


def worker(args):
    """One process: its shards of the inputs, the op, and its shards of the output to a file."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tops.cpu.kda import context_parallel_kda

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices // args.processes)
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{args.port}", args.processes, args.rank)
    mesh = Mesh(np.array(jax.devices()), ("time",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "time"))
    inputs, cu_seqlens = draw(args)
    inputs = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in inputs]

    def op(*inputs):
        return context_parallel_kda(
            *inputs, cu_seqlens=cu_seqlens, output_final_state=True, mesh=mesh, axis_name="time"
        )

    compiled = jax.jit(op).lower(*inputs).compile()
    o, states = compiled(*inputs)
    (shape,) = re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", compiled.as_text())
    received = 4 * math.prod(int(n) for n in shape.split(",")) * (args.devices - 1) // args.devices
    shards = sorted(o.addressable_shards, key=lambda shard: shard.index[1].start or 0)
    o = np.concatenate([shard.data for shard in shards], axis=1)
    np.savez(args.out / f"{args.rank}.npz", o=o, states=states.addressable_data(0), received=received)


def one_device(args):
    import jax

    from tops.cpu.kda import chunk_kda

    jax.config.update("jax_platforms", "cpu")
    inputs, cu_seqlens = draw(args)
    return chunk_kda(*inputs, cu_seqlens=cu_seqlens, output_final_state=True)


def draw(args):
    """(q, k, v, g, beta) and cu_seqlens: one sequence of nearly all tokens, and two short ones about it."""
    rng = np.random.default_rng(0)
    shape = (1, args.tokens, args.heads, args.dim)
    q, k, v, gate = (rng.standard_normal(shape, np.float32) for _ in range(4))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = 1 / (1 + np.exp(-rng.standard_normal(shape[:3], np.float32)))
    ends = np.array([0, args.tokens // 16, args.tokens - args.tokens // 16, args.tokens], np.int32)
    return (q, k, v, -np.logaddexp(0, -gate) / 16, beta), ends


def relative_error(x, truth):
    return np.linalg.norm(np.asarray(x, np.float64) - truth) / np.linalg.norm(truth)


if __name__ == "__main__":
    main()
