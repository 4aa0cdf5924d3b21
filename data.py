"""Data: token shards become packed batches, in an order that depends on nothing but (seed, step).

Seventh file of the reading order. Each step draws examples afresh: a task by the mixture's weights, an
utterance, for TTS another of its speaker as voice prompt. Examples are packed whole, each delayed by itself:

      row 0   [ asr: seven three five ......][ tts: two hundred and six .................][ text ....]  pad
      row 1   [ tts: nine .............][ asr: four two one .............][ speech: ............]       pad

Documents never attend to each other (model.py gets their lengths), and their first frame is never a target.
"""
import json
import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from interleave import (
    TASKS,
    Vocab,
    build_sequence,
    speech_frames,
    stream0_frames,
    task_length,
    text_frames,
    training_rows,
)
from shards import SHARD_FILES, VERSION, check_shards

FILL = 0.97                 # of a batch is drawn before packing: most draws then fit whole


class Dataset:
    """Shards of one split, mapped into memory. ds[i] -> int64 codes (T, N), text ids (M,), speaker number."""

    def __init__(self, folder, split, verify=False, token_streams="both"):
        """token_streams: what we want of the codes, see Vocab.only.  verify: check the shards' checksums."""
        if not os.path.exists(f"{folder}/dataset.json"):
            raise ValueError(f"{folder} is not a finished dataset: run prepare.py first")
        with open(f"{folder}/dataset.json") as f:
            meta = json.load(f)
        if meta["version"] != VERSION:
            raise ValueError(f"{folder} has data version {meta['version']}, we read {VERSION}: "
                             "run prepare.py again")
        self.folder = folder
        self.vocab, self.columns = Vocab(**meta["sizes"]).only(token_streams)
        self.codes, self.text, index, shard = [], [], [], []
        self.shards = meta["splits"][split]["shards"]
        for number, name in enumerate(self.shards):
            path = f"{folder}/{name}"
            lost = [part for part in SHARD_FILES if not os.path.exists(f"{path}.{part}")]
            if lost:
                raise ValueError(f"{path}.{lost[0]} is gone: run prepare.py again")
            try:
                self.codes.append(np.load(f"{path}.codes.npy", mmap_mode="r"))
                self.text.append(np.load(f"{path}.text.npy", mmap_mode="r"))
                index.append(np.load(f"{path}.index.npy"))
            except (ValueError, EOFError):          # numpy finds it too short for what its header says
                raise ValueError(f"a file of {path} is damaged: delete {path}.json and run prepare.py "
                                 "again") from None
            shard.append(np.full(len(index[-1]), number, np.int32))
        if verify:
            check_shards(folder, self.shards)
        self.index = np.concatenate(index) if index else np.zeros((0, 5), np.int64)
        self.shard = np.concatenate(shard) if shard else np.zeros(0, np.int32)
        spoken = np.flatnonzero(self.index[:, 1])       # all but text alone
        self.by_speaker = spoken[np.argsort(self.index[spoken, 4], kind="stable")]
        self.speakers = self.index[self.by_speaker, 4]

    @cached_property
    def info(self):
        """{id, text, speaker, audio: one for each utterance}, for evaluation and people; training has no use
        for it, and for millions of utterances it is long."""
        found = {field: [] for field in ("id", "text", "speaker", "audio")}
        for name in self.shards:
            with open(f"{self.folder}/{name}.json") as f:
                about = json.load(f)
            for field, values in found.items():
                values += about[field]
        return found

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        frame, n_frame, token, n_token, speaker = self.index[i].tolist()
        codes, text = self.codes[self.shard[i]], self.text[self.shard[i]]
        codes, text = codes[frame:frame + n_frame, self.columns], text[token:token + n_token]
        return codes.astype(np.int64), text.astype(np.int64), speaker

    def draw_prompt(self, i, n_frame, rng):
        """Codes of a random other utterance of i's speaker, at most n_frame of them, from a random place.

        One draw among the others, never a search that could go on for ever; a speaker with a single utterance
        prompts itself.
        """
        speaker = self.index[i, 4]
        group = self.by_speaker[slice(*np.searchsorted(self.speakers, [speaker, speaker + 1]))]
        if len(group) > 1:
            j = int(rng.integers(len(group) - 1))
            i = int(group[j + (j >= np.searchsorted(group, i))])        # skip over i itself
        codes = self[i][0]
        start = int(rng.integers(max(len(codes) - n_frame, 0) + 1))
        return codes[start:start + n_frame]


def prompt_frames(vocab, codes, n_frame):
    """Voice prompt codes (T, N), T <= n_frame -> joint-id frames (n_frame, N), padded to a fixed length."""
    return torch.cat([speech_frames(vocab, codes), stream0_frames(vocab, [0] * (n_frame - len(codes)))])


@dataclass
class Batch:
    tokens: torch.Tensor        # (R, S, N) inputs, delayed
    targets: torch.Tensor       # (R, S, N)
    weight: torch.Tensor        # (R, S, N) float; 0 = no loss
    modality: torch.Tensor      # (R, S) of the target's segment
    lengths: list               # R lists of document lengths, the padding at the end as one; each sums to S
    n_frame: int                # frames of all documents, the padding at the end of the rows not counted


class Loader:
    """Packed training batches of one dataset."""

    def __init__(self, dataset, mixture, n_row, row_frames, prompt_len, seed, special_weight=1.0,
                 loss_region="whole", grow=False):
        """mixture: {task: weight}.  n_row: rows of the global batch.  prompt_len: voice prompt frames.
        grow: longer rows, where an example needs them, instead of an error."""
        for task in mixture:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r} in the mixture; "
                                 f"interleave.py has {', '.join(TASKS)}")
        self.dataset, self.vocab = dataset, dataset.vocab
        self.n_row, self.row_frames, self.prompt_len, self.seed = n_row, row_frames, prompt_len, seed
        self.tasks = [task for task, weight in mixture.items() if weight > 0]
        spoken, written = dataset.index[:, 1] > 0, dataset.index[:, 3] > 0
        self.pool = {}              # {task: utterances that have what it needs}
        for task in self.tasks:
            needs = {segment.of for segment in TASKS[task][1]}
            fit = (spoken | (needs == {"text"})) & (written | ("text" not in needs))
            self.pool[task] = np.flatnonzero(fit)
            if len(dataset) and not fit.any():
                raise ValueError(f"the mixture has {task!r}, but no utterance of {dataset.folder} has what "
                                 f"it needs: {' and '.join(sorted(needs))}")
            if len(dataset):
                longest = self.pool[task][self.length(task, self.pool[task]).argmax()]
                length = self.length(task, longest)
                if length > self.row_frames and not grow:
                    name = dataset.info["id"][longest]
                    raise ValueError(f"utterance {name} makes a {task} sequence of {length} frames; rows "
                                     f"have {row_frames}: raise row_frames or lower max_audio_s")
                self.row_frames = max(self.row_frames, int(length))
        share = np.array([mixture[task] for task in self.tasks], float)
        self.share = np.cumsum(share / share.sum())
        self.weights, self.loss_region = self.vocab.weights(special_weight), loss_region
        self.dropped = 0            # drawn but did not fit, over the life of this loader

    def length(self, task, i):
        """Frames that the example (task, utterance i or an array of them) takes in a row: one fewer than its
        sequence has."""
        _, n_frame, _, n_token, _ = self.dataset.index[i].T
        lengths = {"speech": n_frame, "text": n_token, "prompt": self.prompt_len}
        return task_length(self.vocab, task, lengths) - 1

    def plan(self, step):
        """The global batch of a step: n_row lists of (task, utterance, its own seed). Pure in (seed, step).

        First-fit-decreasing packing of as many draws as nearly fill the batch; what does not fit is dropped.
        """
        rng = np.random.default_rng((self.seed, step))
        drawn, total, capacity = [], 0, FILL * self.n_row * self.row_frames
        while True:
            task = self.tasks[np.searchsorted(self.share[:-1], rng.random(), side="right")]
            i = int(self.pool[task][rng.integers(len(self.pool[task]))])
            length = self.length(task, i)
            total += length
            if total > capacity:
                break
            drawn.append((length, task, i, int(rng.integers(2 ** 31))))
        rows, room = [[] for _ in range(self.n_row)], [self.row_frames] * self.n_row
        for length, task, i, seed in sorted(drawn, key=lambda example: -example[0]):
            row = next((r for r in range(self.n_row) if room[r] >= length), None)
            if row is None:
                self.dropped += 1
            else:
                rows[row].append((task, i, seed))
                room[row] -= length
        return rows

    def document(self, task, i, seed):
        """-> aligned tokens (T, N), learn (T,), modality (T,)."""
        codes, text, _ = self.dataset[i]
        entries = {"speech": speech_frames(self.vocab, codes), "text": text_frames(self.vocab, text)}
        if any(segment.of == "prompt" for segment in TASKS[task][1]):
            prompt = self.dataset.draw_prompt(i, self.prompt_len, np.random.default_rng(seed))
            entries["prompt"] = prompt_frames(self.vocab, prompt, self.prompt_len)
        return build_sequence(self.vocab, task, entries, self.loss_region)

    def batch(self, step, rows=None):
        """The Batch of a step, or only some of its rows (a rank's share): R = len(rows)."""
        plan = self.plan(step)
        packed = [self.pack([self.document(*document) for document in plan[r]])
                  for r in (range(self.n_row) if rows is None else rows)]
        tensors = (torch.stack(part) for part in list(zip(*packed))[:4])
        return Batch(*tensors, lengths=[row[4] for row in packed], n_frame=sum(row[5] for row in packed))

    def pack(self, documents):
        """Aligned documents, one after another, padded to row_frames -> tokens, targets, weight, modality,
        lengths (with the padding as a document of its own), and the number of frames before the padding."""
        lengths = [len(document[0]) - 1 for document in documents]
        n_pad = self.row_frames - sum(lengths)
        nothing = (stream0_frames(self.vocab, [0]), torch.zeros(1, dtype=torch.bool), torch.zeros(1).long())
        parts = training_rows(documents or [nothing], self.weights)         # (S', N) x 3, (S',)
        padded = [F.pad(part, (0, 0) * (part.ndim - 1) + (0, n_pad)) for part in parts]     # PAD is 0
        return *padded, lengths + [n_pad] * (n_pad > 0), sum(lengths)
