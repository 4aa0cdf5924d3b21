"""The files that figures of a run are kept in, and what those of two runs say of each other.

Helper of eval.py. results.json has the figures; items.json has each utterance's or question's share in
them, by which two runs are compared on the same ones.
"""
import json
import os

import numpy as np

from shards import write_file


def home_of(run):
    """Folder of a run, or of one of its checkpoints -> the run's, the checkpoint's name or ""."""
    above, name = os.path.split(os.path.abspath(run))
    inside = os.path.isdir(f"{above}/text_tokenizer") and not os.path.isdir(f"{run}/text_tokenizer")
    return (above, name) if inside else (run, "")


def file_ending(checkpoint="", data=None, n=None, join=1, beam=1, guidance=None, quant=""):
    """What files of figures have behind their names that were not made as the run itself says:
    "_step_0001000_n20_beam4"; so nothing overwrites anything else."""
    ways = (("n", n, None), ("join", join, 1), ("beam", beam, 1), ("guidance", guidance, None))
    parts = [checkpoint, os.path.basename((data or "").rstrip("/")), quant]
    parts += [f"{name}{value:g}" for name, value, usual in ways if value != usual]
    return "".join(f"_{part}" for part in parts if part)


def keep_results(run, ending, found, items, anew=False):
    """Write found {part: figures} into RUN/results{ending}.json, and items {measure: [[what, value, of]]},
    each utterance's or question's share in them, into items{ending}.json. Other parts stay, unless anew."""
    for name, new in (("results", found), ("items", items)):
        path, old = f"{run}/{name}{ending}.json", {}
        if os.path.exists(path) and not anew:
            with open(path) as f:
                old = json.load(f)
        write_file(path, json.dumps(old | new, indent=None if name == "items" else 1))


def compare(first, second, draws=2000, **ways):
    """Two evaluated runs on the same texts, utterance by utterance and question by question -> lines: each
    measure of both and the difference, with its 95 % interval by a bootstrap that draws the same for both.
    ways: as of file_ending."""
    lines, read = [], []
    for run in (first, second):
        folder, checkpoint = home_of(run)
        path = f"{folder}/items{file_ending(checkpoint, **ways)}.json"
        if not os.path.exists(path):
            said = "".join(f" --{name}={value}" for name, value in ways.items() if value not in (None, "", 1))
            raise ValueError(f"{run} is not evaluated so yet: python eval.py {run}{said}")
        with open(path) as f:
            read.append(json.load(f))
    for measure in dict.fromkeys((*read[0], *read[1])):
        both = [items.get(measure) or [] for items in read]
        keys = [[what for what, _, _ in items] for items in both]
        if not keys[0] or keys[0] != keys[1]:
            lines.append(f"{measure}: " + ("not of the same in both" if all(keys) else
                                           f"only of {(second, first)[bool(keys[0])]}"))
            continue
        (a, of), (b, other_of) = (np.array([row[1:] for row in items], float).T for items in both)
        picked = np.random.default_rng(0).integers(len(a), size=(draws, len(a)))
        picked = picked[(of[picked].sum(1) > 0) & (other_of[picked].sum(1) > 0)]
        again = b[picked].sum(1) / other_of[picked].sum(1) - a[picked].sum(1) / of[picked].sum(1)
        low, high = np.percentile(again, [2.5, 97.5])
        mine, others = a.sum() / of.sum(), b.sum() / other_of.sum()
        verdict = "clear" if low > 0 or high < 0 else "within chance"
        lines.append(f"{measure}: {mine:.3g} and {others:.3g}, difference {others - mine:+.2g} "
                     f"({low:+.2g} to {high:+.2g}), {verdict}; n={len(a)}")
    return "\n".join(lines)
