"""Sequence parallel: the time axis over the devices of a mesh axis, the state passed on by affine maps.

The state pass over any span of tokens is affine in the state that enters it,

    S_out = M S_in + b      M [K, K], b [K, V]

so that a device needs of all devices before it no more than M and b. Three steps:

    1  each device runs the state pass of what goes on past its end, on V + K columns: v extended by zeros,
       from the state [0 | I], or [S_0 | 0] where the sequence starts here. What leaves is [b | M].
    2  the maps are exchanged, in one all-gather, and each device composes those of the sequence that reaches
       into its span, from the device where it starts: S <- M S + b.
    3  each device runs the chunked forward on its span, from the right state.

Only one sequence reaches into a span from before it, and only one goes on past its end.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as Spec

from . import checks, chunking, contracts
from .activations import Activations
from .one_chunk.xla import matmul
from .scan import Config, scan_chunks
from .types import Array, DType, Scalar, Sequences

MAP_CHUNK = 32  # tokens of a chunk of the map, at most: fewer operations than with 64, in the same time


def context_parallel_kda(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    scale: Scalar | None = None,
    initial_state: Array | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    *,
    state_v_first: bool = False,
    cu_seqlens: Sequences | None = None,
    chunk_size: int = 64,
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    mesh: jax.sharding.Mesh,
    axis_name: str,
    batch_axis_name: str | None = None,
    head_axis_name: str | None = None,
    storage_dtype: DType | None = None,
    output_dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`chunk_kda` with the time axis sharded over the P devices of a mesh axis.

        S'  = diag(exp(g_t)) S_{t-1}
        S_t = S' + beta_t k_t (v_t - k_t^T S')^T
        o_t = scale * q_t^T S_t

    Every device cuts its T / P tokens into chunks of its own: the result is that of `chunk_kda` up to
    rounding. What is exchanged is one all-gather, HV * K * (K + V) values from each device to every other
    one. `output_final_state` takes an all-reduce of N * HV * K * V values besides.

    Args:
        q, k, v, g, beta, ...: what is not named below is as for `chunk_kda`. The arrays are the whole ones,
            [B, T, ...]; where they do not lie on the mesh with T over `axis_name`, JAX moves them.
        cu_seqlens: as there, of the whole T: a sequence may begin and end on any device.
        mesh: a `jax.sharding.Mesh`.
        axis_name: the mesh axis that T is sharded over; its P devices divide T.
        batch_axis_name, head_axis_name: mesh axes that B, and H and HV together, are sharded over too; their
            devices divide B, and H. None: all of it on every device.
        storage_dtype: as for `chunk_kda`; the maps are not rounded.
        output_dtype: as for `chunk_kda`.

    Returns:
        o [B, T, HV, V], sharded as v is, and the final state [N, HV, K, V] or None, the same on every device
        of `axis_name`.

    Raises:
        ValueError, TypeError: in one line, when an argument breaks this contract; see `checks`.

    Source: `fla.ops.cp` (`chunk_gated_delta_rule_fwd_h_pre_process`), for the exchange of [b | M].
    """
    checks.flags(
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=state_v_first,
    )
    cu_seqlens = checks.listed(cu_seqlens)
    scale = contracts.forward(q, k, v, g, beta, scale, initial_state, state_v_first, cu_seqlens)
    chunk_size = checks.chunks(chunk_size, cu_seqlens, None, q.shape[1])
    A_log, dt_bias = contracts.gate(use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate, g)
    axes = dict(
        axis_name=(axis_name, "T"),
        batch_axis_name=(batch_axis_name, "B"),
        head_axis_name=(head_axis_name, "H"),
    )
    contracts.mesh_axes(mesh, axes, dict(zip("BTH", q.shape[:3], strict=True)))
    activations = Activations(
        qk_l2norm=use_qk_l2norm_in_kernel,
        gate=use_gate_in_kernel,
        lower_bound=lower_bound,
        beta_scale=contracts.sigmoid_beta(use_beta_sigmoid_in_kernel, allow_neg_eigval),
    )
    o, final_state = _context_parallel(
        *(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias),
        **dict(C=chunk_size, scale=scale, state_v_first=state_v_first, activations=activations),
        **dict(output_final_state=output_final_state, storage_dtype=checks.storage(storage_dtype)),
        **dict(mesh=mesh, axis_name=axis_name, batch_axis=batch_axis_name, head_axis=head_axis_name),
        output_dtype=checks.storage(output_dtype, "output_dtype") or q.dtype,
    )
    return o, final_state


@partial(
    jax.jit,
    static_argnames=(
        *("C", "scale", "state_v_first", "activations", "output_final_state", "storage_dtype"),
        *("output_dtype", "mesh", "axis_name", "batch_axis", "head_axis"),
    ),
)
def _context_parallel(
    q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
    *, C, scale, state_v_first, activations, output_final_state, storage_dtype,
    output_dtype, mesh, axis_name, batch_axis, head_axis,
):  # fmt: skip
    packed = cu_seqlens is not None
    ends = jnp.asarray(cu_seqlens if packed else [0, q.shape[1]], jnp.int32)
    config = Config(C, scale, activations, ("o",), storage_dtype, output_dtype, packed)

    def on_device(q, k, v, g, beta, initial_state, ends, A_log, dt_bias):
        (B, T, HV, V), K = v.shape, k.shape[-1]  # what is here of them
        N = ends.shape[0] - 1 if packed else B
        dtype = jnp.promote_types(q.dtype, jnp.float32)
        device = lax.axis_index(axis_name)
        start = device * T
        first_states = chunking.first_states(initial_state, N, HV, K, V, state_v_first, dtype)

        # 1: the map of the sequence that goes on past this device's end, if one does.
        n, begins = chunking.sequence_at(ends, start + T)
        tail = jnp.stack([jnp.maximum(begins - start, 0), T]) if packed else None
        S = lax.dynamic_slice_in_dim(first_states, n, 1) if packed else first_states
        identity = jnp.broadcast_to(jnp.eye(K, V + K, V, dtype=dtype), (*S.shape[:-1], V + K))
        S = jnp.where(begins < start, identity, jnp.pad(S, [(0, 0)] * 3 + [(0, K)]))

        def span_map(S):
            of_map = config._replace(C=min(C, MAP_CHUNK), fields=(), storage_dtype=None)
            return scan_chunks(
                *(q, k, jnp.pad(v, [(0, 0)] * 3 + [(0, K)]), g, beta, S, tail, A_log, dt_bias),
                **dict(NT=chunking.max_num_chunks(T, 1, of_map.C), state_v_first=False, config=of_map),
            )[0]

        maps = lax.cond(begins < start + T, span_map, lambda S: S, S)

        # 2: the state of the sequence that reaches into this device's span, if one does.
        maps = lax.all_gather(maps, axis_name)
        n, begins = chunking.sequence_at(ends, start)
        S = compose(maps, begins // T, device, V)
        reaches_in = (begins < start) & ((jnp.arange(N) == n) | (not packed))
        states = jnp.where(reaches_in[:, None, None, None], S, first_states)

        # 3: the forward, of the part of each sequence that lies here.
        own = jnp.clip(ends - start, 0, T) if packed else None
        states, made = scan_chunks(
            *(q, k, v, g, beta, states, own, A_log, dt_bias),
            **dict(NT=chunking.num_chunks(T, own, None, C), state_v_first=False, config=config),
        )
        if not output_final_state:
            return made["o"], None
        # A sequence's final state is where its last token is; that of an empty one, say, on the first device.
        last = jnp.where(jnp.diff(ends) > 0, (ends[1:] - 1) // T, 0) == device
        final_state = lax.psum(jnp.where(last[:, None, None, None], states, 0), axis_name)
        return made["o"], chunking.turn(final_state, state_v_first)

    tokens, states = Spec(batch_axis, axis_name, head_axis), Spec(batch_axis, head_axis)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(*[tokens] * 5, states, Spec(), Spec(head_axis), Spec(head_axis)),
        out_specs=(tokens, states),
        check_vma=False,  # the scan's buffers start as plain zeros, the same on all devices
    )(q, k, v, g, beta, initial_state, ends, A_log, dt_bias)


def compose(maps, first, device, V):
    """The state that enters `device`: S <- M S + b over the devices from `first` on, from S = 0.

    maps [P, n, HV, K, V + K], [b | M] of each device. Returns S [n, HV, K, V].
    """

    def step(S, x):
        i, b, M = x
        between = (first <= i) & (i < device)
        return lax.cond(between, lambda S: b + matmul(M, S), lambda S: S, S), None

    b, M = maps[..., :V], maps[..., V:]
    S, _ = lax.scan(step, jnp.zeros(b.shape[1:], b.dtype), (jnp.arange(len(maps)), b, M))
    return S
