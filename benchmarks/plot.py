"""Time and temporary memory over T, from results.json."""

import json
from pathlib import Path

from matplotlib import pyplot as plt

plt.rcParams.update({"svg.hashsalt": "kda", "svg.fonttype": "none", "font.size": 11})

LABELS = {"chunk_kda": "chunk_kda (ours)", "recurrence": "naive_recurrent_kda (ours)"}


def plot(over_T, path):
    """over_T: {T: {name: {seconds, temporaries}}}."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    Ts = [int(T) for T in over_T]
    for name in next(iter(over_T.values())):
        label = LABELS.get(name, name)
        style = dict(marker="o", linewidth=3 if name == "chunk_kda" else 1.5)
        measured = [by_name[name] for by_name in over_T.values()]
        (line,) = time.plot(Ts, [x["seconds"] for x in measured], label=label, **style)
        if "temporaries" in measured[0]:
            megabytes = [x["temporaries"] / 1e6 for x in measured]
            memory.plot(Ts, megabytes, label=label, color=line.get_color(), **style)
    for axes, title in ((time, "seconds a call"), (memory, "temporaries, MB")):
        axes.set(title=title, xlabel="T  (B=1, H=8, K=V=128, float32)", xscale="log", yscale="log")
        axes.set_xticks(Ts, [str(T) for T in Ts], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    here = Path(__file__).parent
    plot(json.loads((here / "results.json").read_text())["measured"]["over T"], here / "kda.svg")
