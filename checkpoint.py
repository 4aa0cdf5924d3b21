"""Checkpoints: written beside their place while training goes on, renamed when whole, checked when read.

Tenth file of the reading order. A checkpoint is a folder, and only a whole one has its name:

      out/numbers/step_0000250/
          shard-*.safetensors     each worker's part of the weights, of the optimizers' state, and its random
                                  numbers: torch.distributed.checkpoint puts them together for any number
                                  of workers, and nothing in them is code
          config.json             every setting of the run
          state.json              step (which is also the place in the data), frames, seconds, vocabulary,
                                  and length and checksum of every file

What a model starts from, here or in the layouts of others (convert.py), is read in this file too.
"""
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from config import Config, read_config, save_config
from convert import (
    find_start,
    is_published,
    published_layout,
    read_published,
    read_yaml,
    start_weights,
)
from interleave import Vocab
from model import misfits, some
from parallel import compute_dtype, meta_model, put, total
from shards import checksum

warnings.filterwarnings("ignore", message="torch.distributed is disabled")      # one process needs no group

# ---- which there are ---------------------------------------------------------------------------------------

def checkpoints(out_dir):
    """Complete checkpoint folders of a run, oldest first. A folder gets this name only once it is whole."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, name) for name in sorted(names) if re.fullmatch(r"step_\d{7}", name)]


def newest(folder):
    """A checkpoint's folder itself, or the newest of a run's; None if it is neither."""
    if os.path.isfile(f"{folder}/state.json"):
        return folder
    found = checkpoints(folder)
    return found[-1] if found else None


def damage(folder, share=slice(None)):
    """What is wrong with the files of a checkpoint, or ""; share: which of the files to look at."""
    try:
        with open(f"{folder}/state.json") as f:
            files = json.load(f).get("files", {})
        for name in sorted(files)[share]:
            n, crc = checksum(f"{folder}/{name}")
            if n != files[name][0]:
                return f"{name} has {n} bytes, not {files[name][0]}"
            if crc != files[name][1]:
                return f"{name} is not what was written (checksum)"
    except (OSError, ValueError) as problem:
        return str(problem)
    return ""


def newest_whole(out_dir, rank, world, say):
    """The newest undamaged checkpoint of a run, or None; all workers look, each at a share of the files."""
    if os.path.isdir(out_dir):
        for name in sorted(os.listdir(out_dir)):
            if re.fullmatch(r"step_\d{7}\.tmp", name):
                say(f"skipped {out_dir}/{name}: its writing was cut off")
    for folder in reversed(checkpoints(out_dir)):
        problem = damage(folder, slice(rank, None, world))
        if problem:
            print(f"skipped {folder}: {problem}", flush=True)
        if total([bool(problem)])[0] == 0:
            return folder
    return None


# ---- writing and reading them ------------------------------------------------------------------------------

def training_tensors(model, optimizers, rank):
    """All that a run is, as {name: tensor}: weights, optimizer state, this worker's random numbers."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = model.state_dict()
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[id(p)]}.{key}": value for key, value in state.items()}
    return tensors | {f"random.{rank}": torch.get_rng_state()}


class Saver:
    """The one checkpoint writer. The tensors are copied, then threads write them while training goes on."""

    def __init__(self, config, vocab, rank, world):
        self.config, self.vocab, self.rank, self.world = config, vocab, rank, world
        self.group = dist.new_group(backend="gloo") if world > 1 else None      # the threads' own
        self.thread, self.ending = concurrent.futures.ThreadPoolExecutor(1), None

    def start(self, model, optimizers, state):
        """Begin to write the checkpoint of state["step"]; waits for the one before, if it is not done yet."""
        self.finish()
        final = os.path.join(self.config.out_dir, f"step_{state['step']:07d}")
        beside = final + ".tmp"
        if self.rank == 0:
            for name in os.listdir(self.config.out_dir):
                if re.fullmatch(r"step_\d{7}\.tmp", name):
                    shutil.rmtree(f"{self.config.out_dir}/{name}", ignore_errors=True)
            os.makedirs(beside)
        tensors = training_tensors(model, optimizers, self.rank)
        writing = dcp.async_save(
            tensors, process_group=self.group, no_dist=self.group is None,
            storage_writer=dcp.HuggingFaceStorageWriter(beside, save_distributed=True))
        self.ending = self.thread.submit(self.conclude, writing, beside, final, state)

    def conclude(self, writing, beside, final, state):
        """When all parts are written: checksums, state.json, the folder's name; then delete old ones."""
        try:
            writing.result()
            mine = [name for name in os.listdir(beside) if name.startswith(f"shard-{self.rank + 1:05d}-")]
            parts = [{name: checksum(f"{beside}/{name}") for name in mine}] * self.world
            if self.group:
                dist.all_gather_object(parts, parts[0], self.group)
            if self.rank == 0:
                save_config(self.config, f"{beside}/config.json")
                files = {"config.json": checksum(f"{beside}/config.json")}
                for part in parts:
                    files |= part
                save_state(beside, self.vocab, state | {"files": files})
                shutil.rmtree(final, ignore_errors=True)
                os.rename(beside, final)
                for old in checkpoints(self.config.out_dir)[:-self.config.keep_last]:
                    if not self.config.keep_every or int(old[-7:]) % self.config.keep_every:
                        shutil.rmtree(old)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def failed(self):
        """Has the writing come to an end that `finish` will complain about?"""
        return bool(self.ending and self.ending.done() and self.ending.exception())

    def finish(self):
        """Wait until the checkpoint is in its place; ValueError if it could not be written."""
        ending, self.ending = self.ending, None
        problem = ending and ending.exception()
        if problem:
            if isinstance(problem, CheckpointException):                    # of one worker, told to all
                problem = next(iter(problem.failures.values()))[0]
            last = newest(self.config.out_dir)
            raise ValueError(f"a checkpoint could not be written to {self.config.out_dir}: {problem}; "
                             + (f"{last} is whole: make room and go on with --resume" if last else
                                "there is none before it"))


def save_state(folder, vocab, state):
    with open(f"{folder}/state.json", "w") as f:
        json.dump({"vocab": dataclasses.asdict(vocab), **state}, f, indent=1)


def read_state(folder):
    """state.json of a checkpoint, with its vocab as a Vocab."""
    with open(f"{folder}/state.json") as f:
        state = json.load(f)
    return state | {"vocab": Vocab(**state["vocab"])}


def read_tensors(folder, tensors):
    """Fill {name: tensor}, whole or sharded, from a checkpoint or export; an error names what does not
    fit. Tensors without memory are only compared."""
    reader = dcp.HuggingFaceStorageReader(folder)
    found = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}
    known = {name: shape for name, shape in found.items()
             if name in tensors or not name.startswith(("optimizer.", "random."))}
    wrong = misfits(known, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if wrong:
        raise ValueError(f"{folder} holds another model than the configuration's: {some(wrong)}")
    if not any(tensor.is_meta for tensor in tensors.values()):
        dcp.load(tensors, storage_reader=reader, no_dist=True)      # each worker reads its own parts


def make_state(optimizer):
    """A step with gradients and rates of 0 gives an optimizer its state, all zeros."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def resume(folder, model, optimizers, rank):
    """Make a run what it was when `folder` was written, on any number of workers. Returns its state."""
    for optimizer in optimizers:
        make_state(optimizer)
    state = read_state(folder)
    tensors = training_tensors(model, optimizers, rank)
    random = tensors[f"random.{rank}"]
    if rank >= state["workers"]:            # more workers than wrote it: the new ones keep their own
        del tensors[f"random.{rank}"]
    read_tensors(folder, tensors)
    torch.set_rng_state(random)
    return state


# ---- starting from something -------------------------------------------------------------------------------

def same_vocab(vocab, theirs, folder):
    """The data's vocabulary as a model with the vocabulary `theirs` has it: the same sizes, its quirks."""
    ours = dataclasses.replace(vocab, n_tail=theirs.n_tail, published=theirs.published, delay=theirs.delay)
    if ours != theirs:
        raise ValueError(f"{folder} goes with other tokenizers than the data: {theirs} there, {vocab} here")
    return ours


def starting_vocab(folder, vocab):
    """The vocabulary of a model that starts from `folder`, what `init_from` names or "", on these data."""
    if newest(folder):
        return same_vocab(vocab, read_state(newest(folder))["vocab"], folder)
    found = find_start(folder) if folder else ""
    if found and is_published(found):
        return same_vocab(vocab, published_layout(found, read_yaml(found))[0], folder)
    return vocab


def starting_weights(config, vocab, data=""):
    """Look at what `init_from` names -> function that fills a model, whole or sharded, from it.

    data: the folder of prepared data, where config.rows_from_text needs it.
    """
    folder, model = newest(config.init_from), meta_model(config, vocab)
    if folder:
        check_whole(folder)
        read_tensors(folder, model.state_dict())                            # shapes only
        return lambda model: read_tensors(folder, model.state_dict())
    said = centroids = None
    if config.rows_from_text and data:
        if not os.path.exists(f"{data}/align.npz"):
            raise ValueError(f"rows_from_text needs {data}/align.npz: run align.py {data} first")
        said = np.load(f"{data}/align.npz")["said"]
        books = load_file(f"{data}/audio_tokenizer/codebooks.safetensors")
        centroids = books["clusters" if "clusters" in books else "semantic"].float()
    weights = start_weights(config.init_from, model.config, vocab, config.seed, said, centroids)
    return lambda model: fill(model, weights)


def fill(model, weights):
    """Fill a model, whole or sharded, from {name: function that reads it}, one tensor at a time."""
    for name, tensor in model.state_dict().items():
        put(tensor, weights[name]())


def check_whole(folder):
    problem = damage(folder)
    if problem:
        raise ValueError(f"{folder} is damaged: {problem}; take an older checkpoint")


def save_model(folder, config, vocab, model, state):
    """What we hand on: model.safetensors, config.json, state.json, which `load_model` reads."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, f"{folder}/model.safetensors")
    save_config(config, f"{folder}/config.json")
    save_state(folder, vocab, state)


def load_model(folder, device="cpu", dtype="float32"):
    """A folder -> (inference model, Config, Vocab, state).

    folder: a run's (its newest checkpoint), a checkpoint's, an exported one, or that of a published OpusLM,
    which then decodes as its authors do.  dtype: of weights and activations, as of `compute_dtype`.
    """
    dtype = compute_dtype(dtype, torch.device(device))
    if is_published(folder):
        body, vocab, weights, tag = read_published(folder)
        config = Config(**body, init_from=tag or "", prompt_len=500, temperature=0.8,
                        acoustic_temperature=0.8, top_k=30, max_speech_s=2048 / 50)
        state = {"vocab": vocab, "step": 0, "frames": 0, "seconds": 0.0, "data": None}
    else:
        found = newest(folder)
        if not found:
            raise ValueError(f"{folder} holds no checkpoint: train first, python train.py configs/numbers.py")
        check_whole(found)
        config, state = read_config(f"{found}/config.json"), read_state(found)
        vocab = state["vocab"]
    model = meta_model(config, vocab, dtype).to(dtype).to_empty(device=device)
    if is_published(folder):
        fill(model, weights)
    else:
        read_tensors(found, model.state_dict())
    return model.eval().requires_grad_(False), config, vocab, state
