"""Interleaving: how speech and text become one sequence that a decoder-only Transformer can predict.

First file of the reading order; it imports nothing of ours. It holds the joint vocabulary, the task
templates, the delay and the loss weights. See it at work:  python interleave.py [a folder of prepared data]
Implements OpusLM (arXiv 2506.17611), section 2; layout from its toolkit ESPnet-SpeechLM (arXiv 2502.15218).

Dimension letters, used in every file:
  B batch   T frames (time)   S frames in a packed row   N streams (9 = 1 semantic or text + 8 acoustic)
  D width   H query heads   G key-value heads   E head dim   V joint vocabulary

A frame is one row of N ids. Speech fills all N streams (semantic s, acoustic a1..a8, 50 frames a second);
text and special tokens live in stream 0 and leave the others padded. Drawn with N=3, `.` is pad:

      text frame   w  .  .          speech frame   s  a1  a2          special frame   <eos>  .  .
"""
import sys
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

PAD = 0
N_SPECIAL = 256         # ids [0, 256) are reserved, as in the published models; most are unused
SPECIAL = {             # the slots of the published checkpoints: look them up by name, never by number
    "<pad>": PAD, "<unk>": 1, "<sos/eos>": 5,
    "<codec_ssl_start>": 34, "<text_bpe_start>": 35, "<spk_start>": 37,
    "<textlm_task>": 64, "<codec_ssl_asr_task>": 80, "<codec_ssl_tts_task>": 81,
    "<codec_ssl_plain_tts_task>": 82, "<codec_ssl_audiolm_task>": 83,
}
EOS = SPECIAL["<sos/eos>"]
TEXT, SPEECH = 0, 1     # what a segment is made of


# ---- vocabulary --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Vocab:
    """Joint vocabulary: specials, semantic codes, one block per acoustic level, text. Tokenizers give sizes.

        0         256        256+n_semantic                              text_start       size
        | special | semantic | acoustic 1 | acoustic 2 | ... | level K   | text     | tail |

    Either half of a speech frame may be absent (n_semantic = 0 or n_level = 0): the ablations of the paper.
    """
    n_semantic: int     # clusters of the semantic tokenizer (5000 in OpusLM)
    n_acoustic: int     # codes per acoustic level (1024 in OpusLM)
    n_level: int        # acoustic levels (8 in OpusLM)
    n_text: int         # rows of the text tokenizer (49152 for SmolLM2)
    n_tail: int = 0     # rows behind the text that nothing uses (70 in the published checkpoints)
    published: bool = False     # as in the published checkpoints: semantic cluster 0 is pad
    delay: int = 1      # frames by which each stream comes later than the one before; 0: an ablation

    @cached_property
    def streams(self):
        """[(start, end)] joint id range of each stream of a speech frame; its length is N."""
        sizes = [self.n_semantic] * (self.n_semantic > 0) + [self.n_acoustic] * self.n_level
        starts = [N_SPECIAL + sum(sizes[:n]) for n in range(len(sizes))]
        return [(start, start + size) for start, size in zip(starts, sizes)]

    @cached_property
    def starts(self):
        """(N,) first id of each stream."""
        return torch.tensor([start for start, _ in self.streams])

    @cached_property
    def n_stream(self):
        return len(self.streams)

    @property
    def stream_names(self):
        """["semantic", "acoustic1", ...]: what each stream of a speech frame is."""
        return ["semantic"] * (self.n_semantic > 0) + [f"acoustic{k + 1}" for k in range(self.n_level)]

    @property
    def text_start(self):
        return self.streams[-1][1]

    @property
    def text(self):
        """(start, end) joint id range of text."""
        return self.text_start, self.text_start + self.n_text

    @property
    def size(self):
        return self.text[1] + self.n_tail

    def only(self, streams):
        """The vocabulary without one half of a speech frame, and where the other half is in codes (T, N).

        streams: "both", "semantic" or "acoustic" -> (Vocab, slice of columns). For ablations.
        """
        if streams not in ("both", "semantic", "acoustic"):
            raise ValueError(f"token_streams is 'both', 'semantic' or 'acoustic', not {streams!r}")
        if streams == "both":
            return self, slice(0, self.n_stream)
        first = int(self.n_semantic > 0)
        if streams == "semantic":
            return replace(self, n_level=0), slice(0, first)
        return replace(self, n_semantic=0), slice(first, self.n_stream)

    def weights(self, special_weight=1.0, frame_weight=1.0, semantic_share=0.5):
        """(V,) loss weight of each id as a target, so that a speech frame counts as much as one text token.

        text 1, semantic 1/2, acoustic 1/(2(N-1)): the frame sums to 1. A half alone shares the 1 evenly.
        For ablations: frame_weight instead of that 1, and what share of it the semantic token has.
        NOTE(paper): one reading of the paper has 1/(N-1) for acoustic codes; every published recipe has
        0.0625 = 1/(2(N-1)). Those recipes weigh specials 10 in pre-training; we default to 1.
        """
        weight = torch.zeros(self.size)
        weight[1:N_SPECIAL] = special_weight
        weight[slice(*self.text)] = 1.0
        both = self.n_semantic > 0 and self.n_level > 0
        for n, (start, end) in enumerate(self.streams):
            own = semantic_share if n == 0 else (1 - semantic_share) / max(self.n_level, 1)
            weight[start:end] = frame_weight * (own if both else 1 / self.n_stream)
        return weight                                                       # pad keeps 0: it never has a loss


def speech_frames(vocab, codes, semantic_only=False):
    """Raw codes (T, N), each from 0 in its own codebook -> joint ids (T, N).

    semantic_only: the rest is pad, and a token that repeats the one before is left out, so fewer frames.

    NOTE(espnet): its loader shifts every stored id but 0 past the specials, so that semantic cluster 0 became
    pad and the first semantic id is never used. What was trained so wants it so (vocab.published).
    """
    codes = torch.as_tensor(codes, dtype=torch.long)
    N = vocab.n_stream
    assert codes.ndim == 2 and codes.shape[1] == N, f"codes {tuple(codes.shape)}, N={N}"
    frames = codes + vocab.starts                                           # (T, N)
    if vocab.published and vocab.n_semantic:
        frames[codes[:, 0] == 0, 0] = PAD
    if semantic_only:
        frames = frames[changes(codes[:, 0])]
        frames[:, 1:] = PAD
    return frames


def mask_time(frames, n_mask, width, rng):
    """SpecAugment for tokens, as the recipes do it for recognition: n_mask spans of frames (T, N), each of up
    to a share `width` of them, become pad in all streams. Spans may meet. Returns a new tensor."""
    frames, T = frames.clone(), len(frames)
    for _ in range(n_mask):
        span = int(rng.integers(int(width * T) + 1))
        start = int(rng.integers(T - span + 1))
        frames[start:start + span] = PAD
    return frames


def changes(semantic):
    """Semantic tokens (T,) -> (T,) bool: is it another than the one before? Tokens of 20 ms repeat often, and
    a text LLM reads them the better the less they do."""
    semantic = torch.as_tensor(semantic)
    return torch.cat([torch.ones(min(1, len(semantic)), dtype=torch.bool), semantic[1:] != semantic[:-1]])


def speech_codes(vocab, frames):
    """Joint ids (T, N) of complete speech frames -> raw codes (T, N): the inverse of `speech_frames`."""
    codes = frames - vocab.starts                                           # (T, N)
    return codes.clamp_min(0) if vocab.published else codes


def stream0_frames(vocab, ids):
    """Ids (T,) of text or special tokens -> frames (T, N), streams 1.. padded."""
    frames = torch.full((len(ids), vocab.n_stream), PAD, dtype=torch.long)
    frames[:, 0] = torch.as_tensor(ids, dtype=torch.long)
    return frames                                                           # (T, N)


def text_frames(vocab, text_ids):
    """Ids (T,) of the text tokenizer -> frames (T, N)."""
    return stream0_frames(vocab, torch.as_tensor(text_ids, dtype=torch.long) + vocab.text_start)


# ---- task templates ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Segment:
    """One part of a task's sequence: a marker frame (or None), then the frames of entry `of`."""
    marker: str | None
    of: str             # which entry of the example: "speech", "text" or "prompt"
    target: bool = False

    @property
    def modality(self):
        return TEXT if self.of == "text" else SPEECH


SPEECH_IN, TEXT_IN = Segment("<codec_ssl_start>", "speech"), Segment("<text_bpe_start>", "text")
SPEECH_OUT = Segment("<codec_ssl_start>", "speech", target=True)
TEXT_OUT = Segment("<text_bpe_start>", "text", target=True)

# A task is its task token and its segments: to add one, add a line. Text-only sequences start bare, without
# task token or marker, so that they look like what the base LLM was trained on.
TASKS = {
    "asr":       ("<codec_ssl_asr_task>", [SPEECH_IN, TEXT_OUT]),
    "tts":       ("<codec_ssl_tts_task>", [TEXT_IN, Segment("<spk_start>", "prompt"), SPEECH_OUT]),
    "plain_tts": ("<codec_ssl_plain_tts_task>", [TEXT_IN, SPEECH_OUT]),
    "speech":    ("<codec_ssl_audiolm_task>", [SPEECH_OUT]),
    "text":      (None, [Segment(None, "text", target=True)]),
}


def task_length(vocab, task, lengths):
    """Frames of a task's sequence, from the frames of its entries: {"speech": 79, "text": 5} -> int."""
    token, segments = TASKS[task]
    n = 2 if token else 0
    for segment in segments:
        n += (segment.marker is not None) + lengths[segment.of] + segment.target + vocab.n_stream - 1
    return n


def build_sequence(vocab, task, entries, loss_region="whole"):
    """Splice one example into aligned frames, where a row is one moment of speech or one text token.

        ASR   [sos][asr] [speech>] S S S S  P P  [text>] w w [eos] P P        (N = 3: P is N-1 = 2 pad frames)
        TTS   [sos][tts] [text>] w w  P P  [spk>] S S  P P  [speech>] S S S S [eos] P P

    vocab: Vocab.  entries: {"speech" | "text" | "prompt": joint-id frames (T_i, N)}.
    loss_region: "whole" trains on every non-pad token, "target" on target segments with their marker and eos.
    Returns tokens (T, N) long, learn (T,) bool: rows that carry a loss, modality (T,) long: TEXT or SPEECH.
    The P frames after every segment give the delay room, so that one delay over the whole sequence never
    moves a code into the next segment.
    """
    if loss_region not in ("whole", "target"):
        raise ValueError(f"loss_region is 'whole' or 'target', not {loss_region!r}")
    token, segments = TASKS[task]
    T = task_length(vocab, task, {of: len(frames) for of, frames in entries.items()})
    tokens = np.full((T, vocab.n_stream), PAD)          # numpy: small assignments cost a tenth of torch's
    learn = np.full(T, loss_region == "whole")
    modality = np.full(T, segments[0].modality)
    t = 0
    if token:
        tokens[0, 0], tokens[1, 0], t = EOS, SPECIAL[token], 2
    for segment in segments:
        first, frames = t, entries[segment.of]
        if segment.marker:
            tokens[t, 0], t = SPECIAL[segment.marker], t + 1
        tokens[t:t + len(frames)] = frames.numpy()
        t += len(frames)
        if segment.target:
            tokens[t, 0], t = EOS, t + 1
        t += vocab.n_stream - 1                                             # the P frames
        modality[first:t] = segment.modality
        learn[first:t] |= segment.target
    return tuple(torch.from_numpy(part) for part in (tokens, learn, modality))      # (T, N), (T,), (T,)


def generation_prefix(vocab, task, entries):
    """What the model gets before it goes on by itself: the task's sequence up to the target's marker, (T, N).

    Target entries may be missing; where they are given (continuing speech or text) they end the prefix.
    """
    empty = stream0_frames(vocab, [])
    entries = {of: entries.get(of, empty) for of in ("speech", "text", "prompt")}
    tokens, _, _ = build_sequence(vocab, task, entries)
    return tokens[:-vocab.n_stream]                                 # without eos and the last N-1 pad frames


# ---- delay -------------------------------------------------------------------------------------------------

def delay(tokens, by=1):
    """Shift stream n down by n rows, so that acoustic level n is predicted n steps after its semantic token.

    (..., T, N) -> (..., T, N), with N=3 and `t n` the token of frame t in stream n:

        aligned     11 12 13       delayed     11  .  .
                    21 22 23                   21 12  .
                     .  .  .                    . 22 13
                     .  .  .                    .  . 23

    All N predictions of a step are made in parallel, yet the code of level n sees levels < n of its frame.
    What would fall off the end must be pad: the caller leaves N-1 pad frames (build_sequence does).
    by: 0 leaves all as it is, to see what the delay is good for.
    NOTE(espnet): its delay cuts those rows silently and returns nothing for N = 1.
    """
    T, N = tokens.shape[-2:]
    delayed = torch.full_like(tokens, PAD)
    for n in range(N):
        keep = max(T - n * by, 0)
        if (tokens[..., keep:, n] != PAD).any():
            raise ValueError(f"delay would lose tokens of stream {n}: "
                             f"end the sequence with {N - 1} pad frames")
        delayed[..., n * by:, n] = tokens[..., :keep, n]
    return delayed                                                          # (..., T, N)


def undelay(delayed, by=1):
    """The inverse of `delay`: (..., T, N) -> (..., T, N), the last N-1 rows padded again."""
    T, N = delayed.shape[-2:]
    tokens = torch.full_like(delayed, PAD)
    for n in range(N):
        tokens[..., :max(T - n * by, 0), n] = delayed[..., n * by:, n]
    return tokens                                                           # (..., T, N)


# ---- targets and weights -----------------------------------------------------------------------------------

def training_rows(documents, weights, by=1):
    """Aligned documents of `build_sequence`, one after another -> what the model reads and must predict.

    weights: (V,) of `Vocab.weights`.  by: `Vocab.delay`. Returns inputs (S, N), targets (S, N), weight (S, N)
    float and modality (S,), that of the segment the stream-0 target belongs to; each document takes one row
    fewer than it has, since its first row is never a target and its last never read. One delay serves all:
    its shift dies out in the P frames at the end of a document.
    """
    tokens, learn, modality = (torch.cat(part) for part in zip(*documents))
    delayed = delay(tokens, by)
    weight = delay(weights.take(tokens) * learn[:, None], by)               # the loss moves along
    ends = torch.tensor([len(document[0]) for document in documents]).cumsum(0)
    last = torch.zeros(len(tokens), dtype=torch.bool)
    last[ends - 1] = True
    read = (~last).nonzero()[:, 0]                                          # (S,): row t predicts row t + 1
    inputs, targets, weight = (x.index_select(0, rows) for x, rows in (
        (delayed, read), (delayed, read + 1), (weight, read + 1)))
    return inputs, targets, weight, modality[read + 1]


def training_example(vocab, task, entries, weights, loss_region="whole"):
    """`training_rows` of one document: inputs, targets and weight (T-1, N), modality (T-1,)."""
    return training_rows([build_sequence(vocab, task, entries, loss_region)], weights, vocab.delay)


PAINT = {"pad": 90, "special": 33, "text": 32, "semantic": 36, "acoustic": 35}      # colours of a terminal


def show(vocab, frames, paint=False, most=None):
    """Frames (T, N) as text, one row a line: special names, text ids, or the raw code of each stream. paint:
    with a terminal's colours.  most: rows that are shown, the first and the last ones."""
    names = {i: name for name, i in SPECIAL.items()}
    rows = []
    for frame in frames.tolist():
        cells = []
        for n, i in enumerate(frame):
            start = vocab.text_start if n == 0 and i >= vocab.text_start else vocab.streams[n][0]
            kind = ("pad" if i == PAD else "special" if i < N_SPECIAL else
                    "text" if start == vocab.text_start else vocab.stream_names[n].rstrip("0123456789"))
            cell = "." if i == PAD else names.get(i) or "w" * (kind == "text") + str(i - start)
            cell = f"{cell:>{26 if n == 0 else 4}}"
            cells.append(f"\033[{PAINT[kind]}m{cell}\033[0m" if paint else cell)
        rows.append(" ".join(cells))
    if most and len(rows) > most:
        left = len(rows) - most
        rows[most // 2:len(rows) - (most - most // 2)] = [f"{'...':>26} {left} frames more"]
    return "\n".join(rows)


def main(arguments):
    """Print each task's sequence: of a toy example, or of the first utterance of a prepared folder."""
    vocab = Vocab(n_semantic=10, n_acoustic=10, n_level=2, n_text=10)
    four = speech_frames(vocab, [[1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4]])
    entries, most = {"speech": four, "prompt": four[:2], "text": text_frames(vocab, [7, 8])}, None
    if arguments:
        from data import Dataset  # a later file, for this demonstration only
        dataset, most = Dataset(arguments[0], "train"), 40
        vocab, (codes, text, _) = dataset.vocab, dataset[0]
        prompt = dataset.draw_prompt(0, 10, np.random.default_rng(0))
        entries = {"speech": speech_frames(vocab, codes), "prompt": speech_frames(vocab, prompt),
                   "text": text_frames(vocab, text)}
        print(f"{dataset.info['id'][0]}: {dataset.info['text'][0]}, {len(codes)} frames")
    for name in TASKS:
        example, _, _ = build_sequence(vocab, name, entries)
        for how, frames in (("aligned", example), ("delayed", delay(example))):
            print(f"\n{name}: {how}\n{show(vocab, frames, sys.stdout.isatty(), most)}")


if __name__ == "__main__":
    from script import run_script
    run_script(main)
