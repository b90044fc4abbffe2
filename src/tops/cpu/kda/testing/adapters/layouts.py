"""Adapters for where things lie: the order of axes, packing by ids, whole chunks, pools of states."""

import jax.numpy as jnp
import numpy as np

from .arrays import changed, changed_tokens, namespace, of_kind, wide


def tokens(layout):
    """For another order of the axes of q, k, v, g, beta and all that has tokens.

    `layout` orders the letters of q, "BTHK" being FLA's; H is HV and K is V, or is left out, where they are.
    Without a B the op takes one row, and a batch is declined; `flattened` before it makes one row of all.
    """
    ours = "BTHK" if "B" in layout else "THK"
    if sorted(layout) != sorted(ours):
        raise ValueError(f"tokens: expected an order of B, T, H, K or of T, H, K, got {layout!r}")

    def turn(x):
        if "B" not in layout:
            if x.shape[0] != 1:
                raise NotImplementedError("a batch")
            x = x[0]
        return _transposed(x, ours[: x.ndim], [axis for axis in layout if axis in ours[: x.ndim]])

    def back(x):
        x = _transposed(x, [axis for axis in layout if axis in ours[: x.ndim]], ours[: x.ndim])
        return x if "B" in layout else x[None]

    def adapter(fn):
        def adapted(*, q, k, v, g, beta, **options):
            made = fn(q=turn(q), k=turn(k), v=turn(v), g=turn(g), beta=turn(beta), **options)
            return changed_tokens(made, back)

        return adapted

    return adapter


def states(layout):
    """For another order of the axes of states; the op takes no `state_v_first`.

    `layout` orders the letters N, H, K, V, "NHKV" being FLA's, "NHVK" that of `state_v_first`. With a B
    beside N, B is the batch and N the sequences of a row: B and 1 in a dense call, 1 and N in a packed one.
    Of h, the states of the chunks, only K and V change places.
    """
    if "N" not in layout:
        layout = layout.replace("B", "N")
    ours = "BNHKV" if "B" in layout else "NHKV"
    if sorted(layout) != sorted(ours):
        raise ValueError(f"states: expected an order of N, H, K, V, and of B beside N, got {layout!r}")
    v_first = layout.index("V") < layout.index("K")

    def adapter(fn):
        def adapted(*, v, initial_state=None, state_v_first=False, **options):
            def turn(x):
                x = x.swapaxes(-1, -2) if state_v_first else x
                x = x.reshape(v.shape[0], -1, *x.shape[1:]) if "B" in layout else x
                return _transposed(x, ours, layout)

            def back(x):
                x = _transposed(x, layout, ours)
                x = x.reshape(-1, *x.shape[2:]) if "B" in layout else x
                return x.swapaxes(-1, -2) if state_v_first else x

            def back_h(h):
                return h.swapaxes(-1, -2) if v_first != state_v_first else h

            if initial_state is not None:
                options["initial_state"] = turn(initial_state)
            return changed(fn(v=v, **options), final_state=back, h=back_h)

        return adapted

    return adapter


def segments(first=0, states=True, count=None):
    """For an op that packs by segment_ids [B, T], the number of each token's sequence, counted from `first`.

    Padding is a sequence of its own where they count from 0, and 0 where they count from 1. States are those
    of the sequences; without `states` the op has none of a packed call, and what has them is declined.
    `count` is the op's name of the number of sequences, None where it takes none.
    """

    def adapter(fn):
        def adapted(*, q, cu_seqlens=None, **options):
            if cu_seqlens is None:
                return fn(q=q, **options)
            has_states = options.get("output_final_state") or options.get("initial_state") is not None
            if has_states and not states:
                raise NotImplementedError("the states of packed sequences")
            ends, token = np.asarray(cu_seqlens), np.arange(q.shape[1])
            ids = np.searchsorted(ends[1:], token, side="right") + first
            padding = len(ends) - 1 if first == 0 else first - 1
            ids = np.where(token < ends[-1], ids, padding).astype(np.int32)
            options |= {count: len(ends) - 1} if count else {}
            return fn(q=q, segment_ids=of_kind(ids[None], q), **options)

        return adapted

    return adapter


def flattened(fn):
    """For an op that takes one packed row: a batch is handed on as the sequences of one."""

    def adapted(*, q, k, v, g, beta, cu_seqlens=None, **options):
        arrays = dict(q=q, k=k, v=v, g=g, beta=beta)
        if cu_seqlens is not None:
            return fn(**arrays, cu_seqlens=cu_seqlens, **options)
        B, T = q.shape[:2]
        arrays = {name: x.reshape(1, B * T, *x.shape[2:]) for name, x in arrays.items()}
        made = fn(**arrays, cu_seqlens=of_kind(T * np.arange(B + 1), q), **options)
        made = changed_tokens(made, lambda x: x.reshape(B, T, *x.shape[2:]))
        return changed(made, h=lambda h: h.reshape(B, -1, *h.shape[2:]))

    return adapted


def padded(chunk_size):
    """For an op that takes whole chunks: tokens that write and forget nothing fill up each sequence, of a
    dense call each row."""

    def adapter(fn):
        def adapted(*, q, k, v, g, beta, cu_seqlens=None, **options):
            T = q.shape[1]
            ends = np.array([0, T]) if cu_seqlens is None else np.asarray(cu_seqlens)
            lengths = np.diff(ends)
            new_ends = np.concatenate([[0], np.cumsum(-(-lengths // chunk_size) * chunk_size)])
            size = max(new_ends[-1], chunk_size)
            # Token t of sequence n goes to place[t]; what is in no sequence comes from row `size`, zeros.
            place = np.arange(ends[-1]) + np.repeat(new_ends[:-1] - ends[:-1], lengths)
            source = np.full(size, T)
            source[place] = np.arange(ends[-1])
            place = np.concatenate([place, np.full(T - ends[-1], size)])

            def pad(x, is_raw):
                # A raw gate or beta of this size activates to 0.
                value = max(-1e30, float(jnp.finfo(x.dtype).min)) if is_raw else 0.0
                return _with_row(x, value, axis=1)[:, source]

            is_raw = dict(g=options.get("use_gate_in_kernel"), beta=options.get("use_beta_sigmoid_in_kernel"))
            arrays = dict(q=q, k=k, v=v, g=g, beta=beta)
            arrays = {name: pad(x, is_raw.get(name)) for name, x in arrays.items()}
            if cu_seqlens is not None:
                options["cu_seqlens"] = of_kind(new_ends.astype(ends.dtype), q)
            return changed_tokens(fn(**arrays, **options), lambda x: _with_row(x, 0.0, axis=1)[:, place])

        return adapted

    return adapter


def pooled(indices="ssm_state_indices", has_initial_state=None):
    """For an op whose initial_state is a pool of states [P, HV, K, V], and which returns the new pool where
    others return the final states. Comes before `states`.

    `indices` is the op's name of each sequence's place in the pool [N], `has_initial_state` that of the flags
    [N] whether a sequence begins with what is there; None where it has none. The other places are NaN, and so
    are those that a flag says not to read.
    """

    def adapter(fn):
        def adapted(*, q, v, initial_state=None, **options):
            cu_seqlens = options.get("cu_seqlens")
            N = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            places = 2 * np.arange(N)[::-1] + 1
            source = np.full(2 * N + 1, N)
            source[places] = np.arange(N)
            if has_initial_state:
                options[has_initial_state] = of_kind(np.full(N, initial_state is not None), q)
            if initial_state is None:
                state = q.shape[-1], v.shape[-1]
                shape = N, v.shape[2], *(state[::-1] if options.get("state_v_first") else state)
                initial_state = np.full(shape, np.nan if has_initial_state else 0, wide(q).dtype)
            pool = _with_row(initial_state, np.nan, axis=0)[source]
            options |= {indices: of_kind(places.astype(np.int32), q)}
            return changed(fn(q=q, v=v, initial_state=pool, **options), final_state=lambda x: x[places])

        return adapted

    return adapter


def _transposed(x, axes, other):
    """x, whose axes are named by `axes`, with them in the order of `other`."""
    return x.transpose([list(axes).index(axis) for axis in other])


def _with_row(x, value, axis):
    """x with one more row, all of it `value`."""
    xp, shape = namespace(x), list(x.shape)
    shape[axis] = 1
    return xp.concatenate([x, xp.full(shape, value, x.dtype)], axis=axis)
