"""The table of the benchmark: every ratio of what run.py measured, beside its aim."""

from statistics import median

TOKAMAX = ("tokamax xla", "tokamax xla_chunked")


def ratios(results):
    """Every demand: what, against what, the ratio (None: left out), its floor, whether more is better."""
    rows = [
        *layer_rows(results),
        *size_rows(results),
        *gradient_rows(results["gradient"]),
        *tokamax_rows(results["raw layer"], results["raw small"], results["raw short"]),
        *compile_rows(results["compile"]),
        *first_call_rows(results["first call"]),
    ]
    return [dict(zip(("what", "against", "ratio", "floor", "more"), row, strict=True)) for row in rows]


def layer_rows(results):
    layer, decode = results["layer"], results["decode"]
    products = multiply_adds(T=8192, H=32) / 2048**3  # so many large ones are the layer's own
    touch = over(decode, "decode", "touch")
    return [
        ("T=8192, H=32", "jla chunked, times faster", over(layer, "jla chunked"), 12, True),
        ("", "jla token scan, times faster", over(layer, "jla scan"), 4, True),
        ("", "own recurrence, times faster", over(layer, "recurrence"), None, True),
        ("", "the same on the other Python", over(layer, "other recurrence", "other chunk_kda"), 3, True),
        ("", "matrix-product limit, times its time", over(layer, "chunk_kda", "dot") / products, 3.5, False),
        ("", "temporaries, MB", megabytes(layer["chunk_kda"]), 64, False),
        ("25 documents", "the dense call, times its time", over(layer, "packed"), 1.3, False),
        ("bfloat16", "float32, times its time", over(layer, "bfloat16"), 1.1, False),
        ("chunk_kda_fwd", "chunk_kda, times its time", over(layer, "chunk_kda_fwd"), 1.35, False),
        ("decode 64 x 1", "one pass over the states, times its time", touch, 4, False),
    ]


def size_rows(results):
    small, long = results["over T"]["2048"], results["long"]
    return [
        ("T=2048, H=8", "jla chunked, times faster", over(small, "jla chunked"), 8, True),
        ("", "jla token scan, times faster", over(small, "jla scan"), 2, True),
        ("", "FLA naive_chunk_kda, times faster", over(small, "FLA naive_chunk_kda"), None, True),
        ("T=65536, H=8", "T=8192, times its time", over(long, "65536", "8192"), 8.5, False),
        ("T=65536, H=32", "temporaries, MB", megabytes(results["compile"]["T=65536 N=1"]), 64, False),
    ]


def gradient_rows(group):
    other = over(group, "other gradient alone", "other chunk_kda")
    packed = over(group, "packed gradient alone", "packed")
    return [
        ("gradient alone", "chunk_kda, times its time", over(group, "gradient alone"), 4, False),
        ("", "on the other Python", other, 4, False),
        ("", "temporaries, MB", megabytes(group["gradient alone"]), 1500, False),
        ("", "25 documents, times their forward", packed, None, False),
        ("beside results", "chunk_kda, times its time", over(group, "gradient beside results"), None, False),
    ]


def tokamax_rows(layer, small, short):
    """Our forward and our gradient beside its results against tokamax's, of the same raw gates."""
    return [
        *peer_rows("T=8192 raw gates", TOKAMAX, lambda name: over(layer, name), 2),
        *peer_rows("T=2048 raw gates", TOKAMAX, lambda name: over(small, name), 2),
        *tokamax_gradient_rows("T=2048 gradient", "tokamax xla_chunked", small),
        *tokamax_gradient_rows("T=512 gradient", "tokamax xla", short),
    ]


def tokamax_gradient_rows(what, name, group):
    peer, ours = group.get(f"{name} gradient"), group["chunk_kda gradient"]
    memory = peer and peer["temporaries"] / ours["temporaries"]
    return [
        (what, f"{name}, times faster", gradients_over(group, name), 2, True),
        ("", f"{name}, times the temporaries", memory, None, True),
    ]


def compile_rows(group):
    seconds = [x["compile"] for x in group.values()]
    return [
        ("compile", "seconds, the longest of four", max(seconds), 1.5, False),
        ("", "the longest over the shortest", max(seconds) / min(seconds), None, False),
    ]


def first_call_rows(group):
    peers = (*TOKAMAX, "jla chunked")
    return [
        ("first call", "seconds", group["chunk_kda"]["seconds"], None, False),
        *peer_rows("", peers, lambda name: over(group, name)),
        ("first gradient", "seconds", group["chunk_kda gradient"]["seconds"], None, False),
        *peer_rows("", peers, lambda name: gradients_over(group, name)),
    ]


def peer_rows(what, peers, ratio_to, floor=None):
    """A row a peer; the first names what is compared."""
    whats = [what] + [""] * (len(peers) - 1)
    return [
        (what, f"{peer}, times faster", ratio_to(peer), floor, True)
        for what, peer in zip(whats, peers, strict=True)
    ]


def over(group, slow, fast="chunk_kda"):
    """The median over rounds: what is fast in one minute and slow in the next is so for both."""
    if slow not in group:
        return None
    rounds = zip(group[slow]["rounds"], group[fast]["rounds"], strict=False)  # a slow case has fewer
    return median(x / y for x, y in rounds)


def gradients_over(group, slow):
    return over(group, f"{slow} gradient", "chunk_kda gradient")


def megabytes(result):
    return result["temporaries"] / 1e6


def multiply_adds(T, H, K=128, V=128, C=64):
    """Of the four stages as the formulas have them, the causal halves counted once."""
    triangles = C * C * K  # Aqk and L, half a product each
    wy = C * C // 2 * (K + V)
    state = 2 * C * K * V  # w S, kg^T v_new
    output = C * K * V + C * C // 2 * V
    return T // C * H * (triangles + wy + state + output)


def table(rows):
    for row in rows:
        if row["ratio"] is None:
            print(f"{row['what']:16s} {row['against']:44s} left out")
            continue
        floor, verdict = "", ""
        if row["floor"] is not None:
            floor = f"{'at least' if row['more'] else 'at most'} {row['floor']:g}"
            verdict = "ok" if (row["ratio"] >= row["floor"]) == row["more"] else "MISSED"
        print(f"{row['what']:16s} {row['against']:44s} {row['ratio']:7.2f}   {floor:14s} {verdict}")
