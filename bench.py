"""Bench: our training step, decoder and loader, beside what one would write with transformers.

Helper, outside the reading order:  pip install -e '.[bench]'
  python bench.py train                       a step on 4 rows of 512 frames, three quarters of them speech
  python bench.py train --lengths=real        utterances of real lengths: end to end against padded
  python bench.py decode --batch=8            frames a second with a cache
  python bench.py data                        the loader on one core
Variants take turns (A B C A B C ...), on the same weights and batch; ratios are medians over the turns.
Peak memory is that of a process that runs nothing else. Everything is printed, and written to
bench-<what>.json.

The baseline: LlamaModel of transformers under nine summed embeddings, scores of all ids for stream 0 and of
all acoustic ids for streams 1..8, as tensors of the whole batch; autocast where the dtype is bfloat16;
DynamicCache for decoding. MFU counts the products that the loss asks for, forward and backward (6 per
weight and frame in the body; in the heads, per weight and row with a target; acoustic scores of the
original softmax once for all streams; causal attention by half), over the speed of a large product measured
at the start.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, load_config
from data import Dataset, Loader
from decode import prepare_for_decoding, steps
from heads import weighted_loss
from interleave import SPEECH, Vocab, speech_frames, text_frames
from model import body_name
from parallel import (
    compute_dtype,
    empty_model,
    gemm_peak,
    keep_freed_memory,
    prepare_for_speed,
    training_flops,
)
from script import run_script
from shards import VERSION

HERE = os.path.dirname(os.path.abspath(__file__))
VOCAB = Vocab(5000, 1024, 8, 49152)
PROMPT = 100                # frames before decoding starts


# ---- the baseline ------------------------------------------------------------------------------------------

class Baseline(torch.nn.Module):
    """What a user would write: an LLM of transformers with our embedding and heads around it."""

    def __init__(self, model):
        from transformers import LlamaConfig, LlamaModel
        super().__init__()
        c = self.config = model.config
        body = LlamaConfig(
            vocab_size=1, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta, max_position_embeddings=8192)
        self.body = LlamaModel(body)
        weights = {body_name(name): p for name, p in model.state_dict().items()}
        missing, unknown = self.body.load_state_dict(weights, strict=False)
        assert missing == ["embed_tokens.weight"] and set(unknown) == {"emb", "lm_head", "head_emb"}
        self.emb = torch.nn.Embedding.from_pretrained(model.emb.detach().clone(), False, padding_idx=0)
        self.lm_head = torch.nn.Parameter(model.lm_head.detach().clone())
        self.head_emb = torch.nn.Parameter(model.head_emb.detach().clone())

    def loss(self, tokens, targets, weight):
        """tokens, targets, weight (B, T, N) -> the weighted sum of cross-entropies (the original softmax)."""
        c, total = self.config, 0
        x = self.emb(tokens).sum(2)                                         # (B, T, D)
        hidden = self.body(inputs_embeds=x, use_cache=False).last_hidden_state
        start, end = c.streams[1][0], c.streams[-1][1]
        for n in range(c.n_stream):
            first, rows = (0, self.lm_head) if n == 0 else (start, self.lm_head[start:end])
            logits = (hidden + self.head_emb[n] if n else hidden) @ rows.T  # (B, T, ids)
            target = torch.where(weight[..., n] > 0, targets[..., n] - first, -100)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
            total = total + (losses * weight[..., n].flatten()).sum()
        return total

    @torch.no_grad()
    def decode(self, tokens, n_frame):
        """Greedy: tokens (B, T, N) -> (n_frame more delayed rows (B, n_frame, N) of speech, seconds after the
        first of them, whose step reads the prompt)."""
        from transformers import DynamicCache
        c, cache, rows, began = self.config, DynamicCache(), [], None
        for _ in range(n_frame):
            x = self.emb(tokens).sum(2)
            hidden = self.body(inputs_embeds=x, past_key_values=cache).last_hidden_state[:, -1]     # (B, D)
            row = []
            for n, (start, end) in enumerate(c.streams):
                first = 0 if n == 0 else c.streams[1][0]
                rows_n = self.lm_head if n == 0 else self.lm_head[first:c.streams[-1][1]]
                logits = (hidden + self.head_emb[n] if n else hidden) @ rows_n.T                    # (B, ids)
                row.append(start + logits[:, start - first:end - first].argmax(-1))
            tokens = torch.stack(row, 1)[:, None]                           # (B, 1, N)
            began = began if rows else time.perf_counter()
            rows.append(tokens)
        return torch.cat(rows, 1), time.perf_counter() - began


# ---- batches -----------------------------------------------------------------------------------------------

def documents(lengths, seed=0):
    """Random documents, a quarter text, then speech -> [(tokens, targets, weight, modality)] of T rows."""
    generator, table, result = torch.Generator().manual_seed(seed), VOCAB.weights(), []
    for T in lengths:
        n_text = (T + 1) // 4
        text = text_frames(VOCAB, torch.randint(VOCAB.n_text, (n_text,), generator=generator))
        codes = torch.stack([torch.randint(e - s, (T + 1 - n_text,), generator=generator)
                             for s, e in VOCAB.streams], 1)
        rows = torch.cat([text, speech_frames(VOCAB, codes)])               # (T + 1, N)
        modality = (torch.arange(T) + 1 >= n_text).long()
        result.append((rows[:-1], rows[1:], table[rows[1:]], modality))
    return result


def real_lengths(n, seed=0):
    """Lengths of utterances in frames: lognormal, mean 300, at most 1500."""
    draws = np.random.default_rng(seed).lognormal(np.log(300) - 0.18, 0.6, n)
    return np.clip(draws, 20, 1500).astype(int).tolist()


# ---- training ----------------------------------------------------------------------------------------------

def make_model(args, **switches):
    config = load_config([f"{HERE}/configs/{args.size}.py", *(f"--{k}={v}" for k, v in switches.items())])
    dtype = compute_dtype(args.dtype, torch.device("cpu"))
    model = empty_model(config, VOCAB, dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    return prepare_for_speed(model, config, torch.device("cpu"), say=lambda *_: None)


def ours(args, scope, docs, **switches):
    """-> step(): one training step on the packed documents, its loss per target frame; and the GEMM FLOPs."""
    model = make_model(args, **switches)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    tokens, targets, weight, modality = (torch.cat(part) for part in zip(*docs))
    lengths = [len(doc[0]) for doc in docs]
    n = int((weight[:, 0] > 0).sum())

    def step():
        hidden = model(tokens, lengths)
        loss, _ = weighted_loss(model, hidden, targets, weight, modality, scope)
        (loss / n).backward()
        finish_step(model, optimizer)
        return float(loss.detach()) / n
    first = weight[:, 0] > 0
    kinds = (int((first & (modality == kind)).sum()) for kind in (0, 1))
    count = training_flops(model.config, sum(lengths), lengths, *kinds, int((weight[:, 1:] > 0).any(1).sum()),
                           scope)
    return step, count, sum(lengths)


def baseline(args, docs, padded=False):
    """The same for the baseline; padded: documents as a padded batch, else as rows of one length."""
    model = Baseline(make_model(args))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    T = max(len(doc[0]) for doc in docs)
    assert padded or all(len(doc[0]) == T for doc in docs)
    pad = lambda x: F.pad(x, (0, 0, 0, T - len(x)))
    tokens, targets, weight = (torch.stack([pad(doc[i]) for doc in docs]) for i in range(3))
    n = int((weight[..., 0] > 0).sum())
    bf16 = compute_dtype(args.baseline_dtype or args.dtype, torch.device("cpu")) == torch.bfloat16

    def step():
        with torch.autocast("cpu", torch.bfloat16, bf16):
            loss = model.loss(tokens, targets, weight)
        (loss / n).backward()
        finish_step(model, optimizer)
        return float(loss.detach()) / n
    return step, 0, sum(len(doc[0]) for doc in docs)


def finish_step(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_variants(args):
    """{name: function that builds (step, FLOPs, useful frames)}."""
    if args.lengths == "real":
        docs = documents(real_lengths(args.utterances))
        return {"baseline": lambda: baseline(args, docs, padded=True),
                "ours, original": lambda: ours(args, "original", docs),
                "ours, grammar": lambda: ours(args, "grammar", docs)}
    docs = documents([int(args.lengths)] * args.batch)
    variants = {"baseline": lambda: baseline(args, docs),
                "ours, original": lambda: ours(args, "original", docs),
                "ours, grammar": lambda: ours(args, "grammar", docs),
                "ours, original, checkpointing": lambda: ours(args, "original", docs, checkpointing=True)}
    if args.compile:
        variants["ours, original, compiled"] = lambda: ours(args, "original", docs, compile=True)
    return variants


# ---- decoding ----------------------------------------------------------------------------------------------

def prefixes(args):
    return [documents([PROMPT], seed)[0][0] for seed in range(args.batch)]              # B of (PROMPT, N)


def decode_ours(args, quant=""):
    """-> run(): args.frames greedy frames of speech for each of the batch, behind a prompt."""
    model = prepare_for_decoding(make_model(args), quant)
    given = prefixes(args)

    def run():
        going = steps(model, VOCAB, given, SPEECH, args.frames, args.frames)
        next(going)
        began = time.perf_counter()
        rest = list(going)
        return rest[-1][0][0, PROMPT, 0].item(), (time.perf_counter() - began) * (args.frames - 1) / len(rest)
    return run, 0, args.batch * (args.frames - 1)


def decode_baseline(args):
    dtype = compute_dtype(args.baseline_dtype or args.dtype, torch.device("cpu"))
    model = Baseline(make_model(args)).eval().requires_grad_(False).to(dtype)
    given = torch.stack(prefixes(args))

    def run():
        rows, seconds = model.decode(given, args.frames)
        return rows[0, 0, 0].item(), seconds
    return run, 0, args.batch * (args.frames - 1)


# ---- the loader --------------------------------------------------------------------------------------------

def random_dataset(folder, lengths, seed=0):
    """A prepared folder of random codes and texts, one shard, one speaker; a text token every 15 frames."""
    rng, index, frame, token = np.random.default_rng(seed), [], 0, 0
    for n in lengths:
        index.append((frame, n, token, n // 15 + 1, 0))
        frame, token = frame + n, token + n // 15 + 1
    arrays = {"codes": rng.integers(VOCAB.n_acoustic, size=(frame, VOCAB.n_stream)).astype(np.int16),
              "text": rng.integers(VOCAB.n_text, size=token).astype(np.int32),
              "index": np.array(index, np.int64)}
    for part, array in arrays.items():
        np.save(f"{folder}/train-00000.{part}.npy", array)
    names = {field: [str(i) for i in range(len(index))] for field in ("id", "text", "speaker", "audio")}
    with open(f"{folder}/train-00000.json", "w") as f:
        json.dump(names, f)
    with open(f"{folder}/dataset.json", "w") as f:
        json.dump({"version": VERSION, "sizes": asdict(VOCAB), "splits": {"train": {
            "shards": ["train-00000"]}}}, f)
    return Dataset(folder, "train")


def loader_variants(args):
    """Batches of 8 x 8,192 frames from shards of random codes."""
    def build():
        folder = tempfile.TemporaryDirectory()
        dataset = random_dataset(folder.name, real_lengths(500))
        loader = Loader(dataset, Config(mixture={"asr": 1, "tts": 1}, batch_rows=8, row_frames=8192,
                                        prompt_len=500))
        counter = iter(range(10 ** 9))
        return lambda keep=folder: loader.batch(next(counter)).n_frame, 0, 8 * 8192
    return {"loader, one core": build}


# ---- turns, memory, table ----------------------------------------------------------------------------------

def variants(args):
    if args.what == "train":
        return train_variants(args)
    if args.what == "data":
        return loader_variants(args)
    return {"baseline": lambda: decode_baseline(args), "ours": lambda: decode_ours(args),
            "ours, int8": lambda: decode_ours(args, "int8")}


def peak_memory(arguments, name):
    """Memory in MB at the peak of a process that builds one variant and runs it twice."""
    command = [sys.executable, os.path.abspath(__file__), *arguments, f"--alone={name}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return float(result.stdout.split()[-1])


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode", "data"])
    parser.add_argument("--size", default="135m", help="a file of configs/")
    parser.add_argument("--batch", type=int, default=None, help="rows (train: 4) or sequences (decode: 1)")
    parser.add_argument("--lengths", default="512", help="train: frames of a row, or real")
    parser.add_argument("--utterances", type=int, default=16, help="train --lengths=real: how many")
    parser.add_argument("--frames", type=int, default=100, help="decode: frames of each sequence")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--baseline_dtype", help="another one for the baseline")
    parser.add_argument("--only", default="", help="variants whose name contains this, and the baseline")
    parser.add_argument("--compile", action="store_true", help="train: also with compiled blocks")
    parser.add_argument("--no-memory", action="store_true", help="train: do not measure peak memory")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.batch = args.batch or (4 if args.what == "train" else 1)
    torch.set_num_threads(1 if args.what == "data" else os.cpu_count())
    keep_freed_memory()
    builders = variants(args)
    if args.alone:
        step, _, _ = builders[args.alone]()
        step(), step()
        kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return print(kb / 1024)
    builders = {name: build for name, build in builders.items() if args.only in name or name == "baseline"}
    memory = {name: peak_memory(arguments, name) for name in builders} if (
        args.what == "train" and not args.no_memory) else {}
    dtype = compute_dtype(args.dtype, torch.device("cpu"))
    peak = gemm_peak(dtype)
    built = {name: build() for name, build in builders.items()}
    times, losses = {name: [] for name in built}, {}
    for turn in range(args.turns + 1):
        for name, (step, _, _) in built.items():
            began = time.perf_counter()
            result = step()
            result, seconds = result if isinstance(result, tuple) else (result, time.perf_counter() - began)
            if turn:                                        # the first turn warms up
                times[name].append(seconds)
            else:
                losses[name] = result
    print(f"{args.what}, {args.size}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; matrix products reach {peak / 1e9:.0f} GFLOP/s")
    table = {}
    base = times.get("baseline")
    for name, (_, count, frames) in built.items():
        median = statistics.median(times[name])
        ratios = [frames / t * b / built["baseline"][2] for t, b in zip(times[name], base)] if base else [1.0]
        table[name] = {
            "frames_per_second": frames / median, "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)], "mfu": count / median / peak if count else None,
            "peak_memory_mb": memory.get(name), "result": losses[name], "times": times[name]}
        row, mb = table[name], memory.get(name, 0)
        line = f"{name:32s} {row['frames_per_second']:9.1f} frames/s   {row['ratio']:5.2f}x "
        line += f"({min(ratios):.2f} to {max(ratios):.2f})   "
        line += f"MFU {100 * row['mfu']:.0f} %   " if count else ""
        line += f"{mb:6.0f} MB ({mb / memory.get('baseline', mb):.2f}x)   " if mb else ""
        print(line + f"{losses[name]:.6g}")
    with open(f"bench-{args.what}.json", "w") as f:
        json.dump({"arguments": arguments, "gemm_flops": peak, "variants": table}, f, indent=1)


if __name__ == "__main__":
    run_script(main)
