"""Draw the pictures of README.md from a real utterance: python docs/draw.py data/numbers-... [a.svg]

One recognition and one synthesis example as the model gets them, delayed: which kind of token stands where,
and how much each counts in the loss. Grey on clear ground, to be read on light and on dark pages.
"""
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from data import Dataset, prompt_frames
from interleave import N_SPECIAL, PAD, build_sequence, delay, speech_frames, text_frames

HERE = os.path.dirname(os.path.abspath(__file__))
KINDS = {"pad": "#88888822", "special": "#d9a400", "text": "#3f9b58", "semantic": "#2f7fd0",
         "acoustic": "#a35bc4"}
GREY = "#888888"


def kinds(vocab, tokens):
    """Joint ids (T, N) -> (N, T) number of each id's kind in KINDS."""
    kind = np.full(tokens.shape, 4)
    kind[:, 0] = np.where(tokens[:, 0] >= vocab.text_start, 2, 3)
    kind[tokens < N_SPECIAL] = 1
    kind[tokens == PAD] = 0
    return kind.T


def paint(axis, image, title, names, **style):
    axis.imshow(image, aspect="auto", interpolation="nearest", **style)
    axis.set_xticks(np.arange(-0.5, image.shape[1]), minor=True)
    axis.set_yticks(np.arange(-0.5, image.shape[0]), minor=True)
    axis.grid(which="minor", color="#8888", linewidth=0.3)
    axis.tick_params(which="both", length=0, colors=GREY, labelsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set_title(title, color=GREY, fontsize=10, loc="left")
    for spine in axis.spines.values():
        spine.set_visible(False)


def main(folder, path=f"{HERE}/sequences.svg"):
    dataset = Dataset(folder, "train")
    vocab, names = dataset.vocab, ["text, semantic", *dataset.vocab.stream_names[1:]]
    lengths = np.where(dataset.index[:, 3] >= 3, dataset.index[:, 1], 9999)
    i = int(np.argmin(lengths))                 # the shortest utterance of three words: it fits the page
    codes, text, _ = dataset[i]
    prompt = dataset.draw_prompt(i, 12, np.random.default_rng(0))
    entries = {"speech": speech_frames(vocab, codes), "text": text_frames(vocab, text),
               "prompt": prompt_frames(vocab, prompt, 12)}
    weights = vocab.weights()
    figure, axes = plt.subplots(4, 1, figsize=(11, 8.5), layout="constrained")
    for row, (task, what) in enumerate((("asr", "recognition"), ("tts", "synthesis"))):
        tokens, learn, _ = build_sequence(vocab, task, entries, "target")
        weight = delay((weights[tokens] * learn[:, None] * 16).long()).numpy().T / 16
        palette = ListedColormap(list(KINDS.values()))
        title = f"{what}, \"{dataset.info['text'][i]}\": tokens, a column a step"
        image = kinds(vocab, delay(tokens).numpy())
        paint(axes[2 * row], image, title, names, cmap=palette, vmin=-0.5, vmax=4.5)
        title = f"{what}: what counts in the loss (text 1, semantic 1/2, acoustic 1/16 each)"
        paint(axes[2 * row + 1], np.ma.masked_equal(weight, 0), title, names, cmap="viridis", vmin=0, vmax=1)
    handles = [Patch(color=colour, label=name) for name, colour in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncol=5, labelcolor=GREY, frameon=False)
    figure.savefig(path, format="svg", transparent=True)
    print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
