"""Data: token shards become packed batches, in an order that depends on nothing but (seed, step).

Eighth file of the reading order. Each step draws examples afresh: a task by the mixture's weights, an
utterance, for TTS another of its speaker as voice prompt. Examples are packed whole, each delayed by itself:

      row 0   [ asr: seven three five ......][ tts: two hundred and six .................][ text ....]  pad
      row 1   [ tts: nine .............][ asr: four two one .............][ speech: ............]       pad

Documents never attend to each other (model.py gets their lengths), and their first frame is never a target.
"""
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from interleave import (
    TASKS,
    Vocab,
    build_sequence,
    mask_time,
    speech_frames,
    stream0_frames,
    task_length,
    text_frames,
    training_rows,
)
from shards import AUDIO_FILES, SHARD_FILES, VERSION, check_shards, checksum
from tokenize_text import TextTokenizer

FILL = 0.97                 # of a batch is drawn before packing: most draws then fit whole


def read_about(folder):
    """dataset.json of a prepared folder."""
    if not os.path.exists(f"{folder}/dataset.json"):
        raise ValueError(f"{folder} is not a finished dataset: run prepare.py first")
    with open(f"{folder}/dataset.json") as f:
        about = json.load(f)
    if about["version"] != VERSION:
        raise ValueError(f"{folder} has data version {about['version']}, we read {VERSION}: "
                         "run prepare.py again")
    return about


def tokenizers(folder):
    """Checksums of what made the tokens of a prepared folder."""
    names = [f"text_tokenizer/{name}" for name in sorted(os.listdir(f"{folder}/text_tokenizer"))]
    names += [f"audio_tokenizer/{name}" for name in AUDIO_FILES]
    return [(name, checksum(f"{folder}/{name}")) for name in names]


class Dataset:
    """Shards of one split, mapped into memory. ds[i] -> int64 codes (T, N), text ids (M,), speaker number."""

    def __init__(self, folder, split, verify=False, token_streams="both", others=()):
        """token_streams: what we want of the codes, see Vocab.only.  verify: check the shards' checksums.
        others: further folders, made with the same tokenizers; `source` says whence an utterance is."""
        self.folder, abouts = folder, [read_about(path) for path in (folder, *others)]
        for path, about in zip(others, abouts[1:]):
            if about["sizes"] != abouts[0]["sizes"] or tokenizers(path) != tokenizers(folder):
                raise ValueError(f"{path} and {folder} were made with different tokenizers")
        self.vocab, self.columns = Vocab(**abouts[0]["sizes"]).only(token_streams)
        self.codes, self.text, index, shard, source = [], [], [], [], []
        self.shards = [(number, f"{path}/{name}") for number, (path, about) in enumerate(
            zip((folder, *others), abouts)) for name in about["splits"][split]["shards"]]
        for number, (place, path) in enumerate(self.shards):
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
            source.append(np.full(len(index[-1]), place, np.int16))
            index[-1][:, 4] += sum(len(about["speakers"]) for about in abouts[:place])
        if verify:
            check_shards([path for _, path in self.shards])
        self.index = np.concatenate(index) if index else np.zeros((0, 5), np.int64)
        self.shard = np.concatenate(shard) if shard else np.zeros(0, np.int32)
        self.source = np.concatenate(source) if source else np.zeros(0, np.int16)
        spoken = np.flatnonzero(self.index[:, 1])       # all but text alone
        self.by_speaker = spoken[np.argsort(self.index[spoken, 4], kind="stable")]
        self.speakers = self.index[self.by_speaker, 4]

    @cached_property
    def info(self):
        """{id, text, speaker, audio: one for each utterance}, for evaluation and people; training has no use
        for it, and for millions of utterances it is long."""
        found = {field: [] for field in ("id", "text", "speaker", "audio")}
        for _, path in self.shards:
            with open(f"{path}.json") as f:
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

    def paired(self):
        """(M',) the utterances that have both speech and a text."""
        return np.flatnonzero((self.index[:, 1] > 0) & (self.index[:, 3] > 0))

    def able(self, task):
        """(M',) the utterances that have what a task needs: speech, a text, or both."""
        needs = {segment.of for segment in TASKS[task][1]}
        return np.flatnonzero(((self.index[:, 1] > 0) | (needs == {"text"}))
                              & ((self.index[:, 3] > 0) | ("text" not in needs)))

    def count_changes(self):
        """(M,) how many of each utterance's frames have another semantic token than the one before."""
        found, index = np.zeros(len(self), np.int64), self.index
        for k, codes in enumerate(self.codes):
            mine = slice(*np.searchsorted(self.shard, [k, k + 1]))      # its utterances lie together
            semantic = codes[:, self.columns][:, 0]
            so_far = np.append(0, np.cumsum(semantic[1:] != semantic[:-1]))     # up to and with each frame
            first, n = index[mine, 0], index[mine, 1]
            last = np.maximum(first + n - 1, 0)
            found[mine] = np.where(n > 0, 1 + so_far[last] - so_far[np.minimum(first, last)], 0)
        return found

    def of_speaker(self, i):
        """(M,) the utterances with speech of i's speaker, in order."""
        speaker = self.index[i, 4]
        return self.by_speaker[slice(*np.searchsorted(self.speakers, [speaker, speaker + 1]))]

    def draw_prompt(self, i, n_frame, rng, members=()):
        """Codes of a random other utterance of i's speaker, at most n_frame of them, from a random place; not
        one of `members` either, what is joined with i.

        One draw among the others, never a search that could go on for ever; a speaker who has no other
        prompts itself.
        """
        group = self.of_speaker(i)
        taken = np.searchsorted(group, sorted({i, *members}))               # places in the group
        if len(group) > len(taken):
            j = int(rng.integers(len(group) - len(taken)))
            for place in taken:
                j += j >= place
            i = int(group[j])
        codes = self[i][0]
        start = int(rng.integers(max(len(codes) - n_frame, 0) + 1))
        return codes[start:start + n_frame]


# ---- what a run draws from: config is config.py's Config ---------------------------------------------------

def open_data(config, folder, verify=False):
    """The training split of `folder`, and of the others of config.datasets and config.curriculum."""
    dataset = Dataset(folder, "train", verify, config.token_streams, sources(config, folder)[1:])
    dataset.vocab = replace(dataset.vocab, delay=config.delay)
    return dataset


def sources(config, folder):
    """Folders that a run draws from: the one that says what its tokens are, then the others."""
    return list(dict.fromkeys([folder, *config.datasets, *config.curriculum]))


# ---- batches -----------------------------------------------------------------------------------------------

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

    def __init__(self, dataset, config, held_out=False):
        """config: config.py's Config, of which we read what shapes sequences and batches.  held_out:
        utterances as they are: none joined or masked, none from other folders, and longer rows, where one
        needs them, instead of an error."""
        c = config if not held_out else replace(config, datasets={}, curriculum={}, splice_frames=0,
                                                recombine_frames=0, time_masks=0)
        self.dataset, self.vocab, self.config, self.held_out = dataset, dataset.vocab, c, held_out
        for task in c.mixture:
            if task not in TASKS:
                raise ValueError(f"unknown task {task!r} in the mixture; "
                                 f"interleave.py has {', '.join(TASKS)}")
        self.row_frames = c.row_frames
        self.weights = self.vocab.weights(c.special_weight, c.frame_weight, c.semantic_share)
        joins = c.recombine_frames or c.splice_frames
        self.tokenizer = TextTokenizer.load(f"{dataset.folder}/text_tokenizer") if joins else None
        self.border = len(self.tokenizer.separator()) if joins else 0   # text tokens between joined texts
        self.dropped = 0            # drawn but did not fit, over the life of this loader
        self.tasks = [task for task, weight in c.mixture.items() if weight > 0]
        share = np.array([c.mixture[task] for task in self.tasks], float)
        self.share = np.cumsum(share / share.sum())
        self.frames, self.tokens = (np.concatenate([[0], np.cumsum(dataset.index[:, k])]) for k in (1, 3))
        self.heard = np.append(0, np.cumsum(dataset.count_changes())) if c.semantic_asr else self.frames
        self.joinable = self.find_joinable(c.splice_frames)
        places, weights = sources(c, dataset.folder), c.datasets or {dataset.folder: 1.0}
        ends = np.rint(np.cumsum([0.0, *c.curriculum.values()]) * c.max_steps)[1:]
        # (number of a folder, step): until that step examples come from that folder alone, none joined
        self.lessons = list(zip(map(places.index, c.curriculum), ends))
        self.pool, self.folder_share = {}, {}
        for task in self.tasks if len(dataset) else ():
            self.fill_pool(task, [weights.get(place, 0.0) for place in places])

    def find_joinable(self, splice):
        """(M,): with how many utterances a splice of at most `splice` frames can begin at each: itself, and
        those after it, by the same speaker and with both speech and text."""
        index, M = self.dataset.index, len(self.dataset)
        alone = (index[:, 1] == 0) | (index[:, 3] == 0)
        border = (np.diff(index[:, 4]) != 0) | (np.diff(self.dataset.shard) != 0) | alone[1:] | alone[:-1]
        ends = np.append(np.flatnonzero(border) + 1, M)
        end = ends[np.searchsorted(ends, np.arange(M), side="right")]
        fits = np.searchsorted(self.frames, self.frames[:-1] + splice, side="right") - 1
        return np.maximum(1, np.minimum(end, fits) - np.arange(M))

    def fill_pool(self, task, shares):
        """Find the utterances that have what a task needs, by folder, each with its weight, and see whether
        they fit."""
        able = self.dataset.able(task)
        if not len(able):
            needs = sorted({segment.of for segment in TASKS[task][1]})
            raise ValueError(f"the mixture has {task!r}, but no utterance of {self.dataset.folder} has what "
                             f"it needs: {' and '.join(needs)}")
        folders = [able[self.dataset.source[able] == k] for k in range(len(shares))]
        weight = np.array([share * (len(pool) > 0) for share, pool in zip(shares, folders)], float)
        if not weight.sum():
            raise ValueError(f"no folder with a weight has utterances for {task!r}")
        if not all(len(folders[place]) for place, _ in self.lessons):
            raise ValueError(f"a folder of the curriculum has no utterances for {task!r}")
        self.pool[task], self.folder_share[task] = folders, np.cumsum(weight / weight.sum())
        frames, most = self.ends(task), self.most(task, able)
        lengths = self.size(task, frames[able + most] - frames[able],
                            self.tokens[able + most] - self.tokens[able] + (most - 1) * self.border)
        longest = int(lengths.max())
        if longest > self.row_frames and not self.held_out:
            name = self.dataset.info["id"][able[lengths.argmax()]]
            raise ValueError(f"utterance {name} makes a {task} sequence of {longest} frames; rows have "
                             f"{self.row_frames}: raise row_frames or lower max_audio_s")
        self.row_frames = max(self.row_frames, longest)

    def ends(self, task):
        """(M + 1,) frames of speech that a task reads, summed up before each utterance."""
        return self.heard if task == "asr" else self.frames

    def size(self, task, speech, text):
        """Frames that an example takes in a row, one fewer than its sequence has: of numbers or arrays."""
        lengths = {"speech": speech, "prompt": self.config.prompt_len, "text": text}
        return task_length(self.vocab, task, lengths) - 1

    def length(self, task, members):
        """The same, at most, of utterances [number] that are joined."""
        i, frames = np.array(members), self.ends(task)
        text = (self.tokens[i + 1] - self.tokens[i]).sum() + (len(i) - 1) * self.border
        return int(self.size(task, (frames[i + 1] - frames[i]).sum(), text))

    def most(self, task, i):
        """With how many utterances an example at i, or an array of them, can begin: text is not joined."""
        return self.joinable[i] if task != "text" else np.ones_like(self.joinable[i])

    def members(self, task, i, seed):
        """Utterances [number] that the example (task, i, seed) joins: i and, from none to as many as can be,
        those after it; to recombine, others of its speaker, up to a random share of recombine_frames."""
        longest = self.config.recombine_frames
        if not longest or not {"speech", "text"} <= {segment.of for segment in TASKS[task][1]}:
            return list(range(i, i + 1 + seed % int(self.most(task, i))))
        rng, group, found = np.random.default_rng((seed, 2)), self.dataset.of_speaker(i), [i]
        frames = self.ends(task)
        room = rng.integers(longest + 1) - (frames[i + 1] - frames[i])
        while len(group) > 1:
            i = int(group[rng.integers(len(group))])
            room -= frames[i + 1] - frames[i]
            if (room < 0 or self.tokens[i + 1] == self.tokens[i]            # full, or one without a text
                    or self.length(task, [*found, i]) > self.row_frames):
                break
            found.append(i)
        return found

    def plan(self, step):
        """The global batch of a step: for each row a list of (task, utterances [number] that are joined, the
        example's own seed). Pure in (seed, step).

        First-fit-decreasing packing of as many draws as nearly fill the batch; what does not fit is dropped.
        """
        rng, n_row = np.random.default_rng((self.config.seed, step)), self.config.batch_rows
        lesson = next((place for place, end in self.lessons if step < end), None)
        drawn, total, capacity = [], 0, FILL * n_row * self.row_frames
        while True:
            task = self.tasks[np.searchsorted(self.share[:-1], rng.random(), side="right")]
            pools, share = self.pool[task], self.folder_share[task]
            k = np.searchsorted(share[:-1], rng.random(), side="right") if len(pools) > 1 else 0
            pool = pools[k if lesson is None else lesson]
            i, seed = int(pool[rng.integers(len(pool))]), int(rng.integers(2 ** 31))
            members = self.members(task, i, seed) if lesson is None else [i]
            length = self.length(task, members)
            total += length
            if drawn and total > capacity:
                break
            drawn.append((length, task, members, seed))
        rows, room = [[] for _ in range(n_row)], [self.row_frames] * n_row
        for length, task, members, seed in sorted(drawn, key=lambda example: -example[0]):
            row = next((r for r in range(n_row) if room[r] >= length), None)
            if row is None:
                self.dropped += 1
            else:
                rows[row].append((task, members, seed))
                room[row] -= length
        return rows

    def document(self, task, members, seed):
        """One example of a plan -> aligned tokens (T, N), learn (T,), modality (T,)."""
        c = self.config
        parts = [self.dataset[k] for k in members]
        codes = np.concatenate([part[0] for part in parts])                 # (T', N)
        text = self.join([part[1] for part in parts])
        entries = {"speech": speech_frames(self.vocab, codes, task == "asr" and c.semantic_asr),
                   "text": text_frames(self.vocab, text)}
        if task == "asr" and c.time_masks:
            rng = np.random.default_rng((seed, 1))
            entries["speech"] = mask_time(entries["speech"], c.time_masks, c.time_mask_width, rng)
        if any(segment.of == "prompt" for segment in TASKS[task][1]):
            prompt = self.dataset.draw_prompt(members[0], c.prompt_len, np.random.default_rng(seed), members)
            entries["prompt"] = prompt_frames(self.vocab, prompt, c.prompt_len)
        return build_sequence(self.vocab, task, entries, c.loss_region)

    def join(self, texts):
        """Texts (M_k,) -> (M,), in the tokens that they have as one text, and with no more than planned."""
        if len(texts) == 1:
            return texts[0]
        whole = self.tokenizer.encode(" ".join(self.tokenizer.decode(text) for text in texts))
        if len(whole) <= sum(map(len, texts)) + (len(texts) - 1) * self.border:
            return np.array(whole)
        return np.concatenate([part for text in texts for part in (self.tokenizer.separator(), text)][1:])

    def batch(self, step, rows=None):
        """The Batch of a step, or only some of its rows (a rank's share): R = len(rows).

        S is what the fullest of them needs, at most row_frames: nothing is computed that all rows lack."""
        plan = self.plan(step)
        made = [[self.document(*document) for document in plan[r]]
                for r in (range(len(plan)) if rows is None else rows)]
        S = max([1, *(sum(len(document[0]) - 1 for document in row) for row in made)])
        packed = [self.pack(row, S) for row in made]
        tensors = (torch.stack(part) for part in list(zip(*packed))[:4])
        return Batch(*tensors, lengths=[row[4] for row in packed], n_frame=sum(row[5] for row in packed))

    def pack(self, documents, S):
        """Aligned documents, one after another, padded to S frames -> tokens, targets, weight, modality,
        lengths (with the padding as a document of its own), and the number of frames before the padding."""
        lengths = [len(document[0]) - 1 for document in documents]
        n_pad = S - sum(lengths)
        nothing = (stream0_frames(self.vocab, [0]), torch.zeros(1, dtype=torch.bool), torch.zeros(1).long())
        documents = documents or [nothing]
        parts = training_rows(documents, self.weights, self.vocab.delay)    # (S', N) x 3, (S',)
        padded = [F.pad(part, (0, 0) * (part.ndim - 1) + (0, n_pad)) for part in parts]     # PAD is 0
        return *padded, lengths + [n_pad] * (n_pad > 0), sum(lengths)
