"""Plot: the curves of a run, and of several beside each other.

Helper of train.py and eval.py: train.py leaves curves.png beside out.jsonl, eval.py draws it again with the
error rates, and   python eval.py out/a --plot out/b out/c   compares runs in out/a/compare.png. A run is its
folder, or an out.jsonl that was kept, under any name.
"""
import json
import os


def read_run(run):
    """-> rows of out.jsonl [{"step", "loss", ..., "held_out"}], and of wer.jsonl [{"step", "tts", ...}].

    A line that was cut off by a kill is left out.
    """
    found = []
    for name in ("out", "wer"):
        rows, path = [], f"{run}/{name}.jsonl"
        if name == "out" and os.path.isfile(run):
            path = run
        if os.path.exists(path):
            with open(path) as f:
                for line in f:
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError:
                        continue
        found.append(rows)
    return found


def draw(axis, rows, name, x="step", held_out=False, **style):
    """One quantity over the steps, if it is there."""
    source = [(row, row.get("held_out", {}) if held_out else row) for row in rows]
    points = [(row[x], values[name]) for row, values in source if values.get(name) is not None and x in row]
    if points:
        axis.plot(*zip(*points), **style)
    return bool(points)


def canvas(heights):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(len(heights), 1, figsize=(8, 1.9 * sum(heights)), sharex=True, squeeze=False,
                        height_ratios=heights, layout="constrained")


def in_grey(axis):
    """Labels that can be read on light and on dark pages."""
    axis.tick_params(colors="#888888", labelsize=8)
    for spine in axis.spines.values():
        spine.set_color("#888888")
    for part in (axis.xaxis.label, axis.yaxis.label, axis.title):
        part.set_color("#888888")


def finish(figure, axes, path):
    """Write a figure whose ground is clear."""
    import matplotlib.pyplot as plt
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
        axis.patch.set_alpha(0)
        in_grey(axis)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, ncol=2, framealpha=0.3, labelcolor="#888888")
    figure.patch.set_alpha(0)
    figure.savefig(path + ".tmp", format="png", dpi=110)
    os.replace(path + ".tmp", path)
    plt.close(figure)


def plot_curves(run):
    """curves.png: losses in all and per kind of token, training and held out, the rate, WER if measured."""
    rows, wers = read_run(run)
    if not rows:
        return
    names = [name for name in ("text", "semantic", "acoustic1", "acoustic4", "acoustic8")
             if any(name in row for row in rows)]
    figure, axes = canvas([3, 1, 1.5] if wers else [3, 1])
    losses, rate = axes[0, 0], axes[1, 0]
    draw(losses, rows, "loss", color="#888888", linewidth=2, label="all, by weight")
    held = dict.fromkeys(key for row in rows for key in row.get("held_out", {}))    # "asr text"
    markers = dict(zip(dict.fromkeys(key.split()[0] for key in held), "osvDP^"))    # one for each task
    for i, name in enumerate(names):
        draw(losses, rows, name, color=f"C{i}", alpha=0.6, label=name)
        for key in held:
            if key.split()[-1] == name:
                draw(losses, rows, key, held_out=True, color=f"C{i}", marker=markers.get(key.split()[0], "."),
                     markersize=3, label=f"{key}, held out")
    losses.set(ylabel="loss, nats per token")
    draw(rate, rows, "lr", color="#888888")
    rate.set(ylabel="learning rate")
    if wers:
        for i, name in enumerate(("asr_seen", "asr_unseen", "tts")):
            draw(axes[2, 0], wers, name, color=f"C{i}", marker="o", label=f"WER, {name.replace('_', ' ')}")
        axes[2, 0].set(ylabel="WER, %", ylim=(0, None))
    axes[-1, 0].set(xlabel="step")
    finish(figure, axes, f"{run}/curves.png")


def plot_comparison(runs, path):
    """Held-out losses of recognised text and of spoken semantic tokens, and WER, of several runs over the
    frames that each has seen."""
    found = [read_run(run) for run in runs]
    names = [os.path.basename(run.rstrip("/")).removesuffix(".jsonl") for run in runs]
    labels = names if len(set(names)) == len(names) else runs
    figure, axes = canvas([2, 2, 2] if any(wers for _, wers in found) else [2, 2])
    for i, (run, (rows, wers)) in enumerate(zip(runs, found)):
        if not rows:
            raise ValueError(f"{run} has no out.jsonl: name folders of runs")
        run = labels[i]
        for axis, task, name in zip(axes[:2, 0], ("asr", "tts"), ("text", "semantic")):
            style = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": run}
            if not any(draw(axis, rows, key, "frames", True, **style)
                       for key in (f"{task} {name}", f"plain_{task} {name}", name)):
                draw(axis, rows, name, "frames", color=f"C{i}", label=f"{run}, in training")
            axis.set(ylabel=f"{name}, nats", title="")
        if wers:
            draw(axes[2, 0], wers, "asr_unseen", "frames", color=f"C{i}", marker="o", label=run)
            draw(axes[2, 0], wers, "tts", "frames", color=f"C{i}", marker="x", linestyle=":",
                 label=f"{run}, TTS")
            axes[2, 0].set(ylabel="WER, %")
    axes[-1, 0].set(xlabel="frames")
    finish(figure, axes, path)
