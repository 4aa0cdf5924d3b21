"""Processes, devices and checkpoints: everything around the model that is not the model.

Ninth file of the reading order. Parallelism is applied from here, model.py knows nothing of it: every
worker holds the whole model, takes its rows of the global batch, and the gradients are summed over workers.
"""
import ctypes
import dataclasses
import importlib.util
import json
import os
import re
import shutil

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from attention import attend_flash, attend_varlen
from config import Config, read_config, save_config
from convert import (
    find_start,
    is_published,
    list_tensors,
    published_layout,
    put,
    read_published,
    read_tensor,
    read_yaml,
    start_weights,
)
from interleave import N_SPECIAL, Vocab
from model import Model, ModelConfig, misfits, some

# ---- processes ---------------------------------------------------------------------------------------------

def keep_freed_memory():
    """Tell glibc to reuse large freed blocks instead of giving them back to the system.

    A training step on a CPU allocates the same hundreds of blocks each time; fetching every page anew took a
    quarter of a step of the 135M model.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):       # another C library
        return
    mallopt(-4, 0)                          # M_MMAP_MAX: large blocks come from the heap too
    mallopt(-1, 2 ** 31 - 1)                # M_TRIM_THRESHOLD: whose end is kept


def start_workers():
    """Join the process group that torchrun made, if it did. Returns (rank, world size, device)."""
    device = torch.device("cpu")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return dist.get_rank(), dist.get_world_size(), device


def total(values):
    """Sum a small list of numbers over all workers."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        tensor = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(tensor)
    return tensor.tolist()


def sum_gradients(params):
    """Sum the gradients over the workers, as one flat message; what no batch needed has a gradient of 0."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


def compute_dtype(name, device):
    """The dtype of activations. "auto": bfloat16 where the machine multiplies it fast, else float32."""
    if name != "auto":
        if name not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is auto, float32 or bfloat16, not {name!r}")
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def prepare_for_speed(model, config, device, say=print):
    """Choose the attention of this device, and turn on what the configuration asks for. Returns the model."""
    if device.type == "cuda" and model.dtype == torch.bfloat16:
        flash = importlib.util.find_spec("flash_attn") is not None
        model.attend = attend_flash if flash else attend_varlen
    model.checkpointing = config.checkpointing
    compiler = config.compile and (device.type == "cuda" or shutil.which("g++") or shutil.which("clang++"))
    if compiler:            # the two halves of a block; attention between them depends on the documents
        for block in model.blocks:
            block.qkv, block.finish = torch.compile(block.qkv), torch.compile(block.finish)
    elif config.compile:
        say("compile: no C++ compiler here, so we run without")
    say(f"attention: {model.attend.__name__}" + ", blocks compiled" * bool(compiler)
        + ", activations recomputed" * config.checkpointing)
    return model


# ---- model and checkpoints ---------------------------------------------------------------------------------

def make_model(config, vocab, dtype=torch.float32):
    """The Config's model for a Vocab, weights not initialised."""
    if config.model_type not in ("llama", "olmo2"):
        raise ValueError(f"model_type is 'llama' or 'olmo2', not {config.model_type!r}")
    if config.d_model % (2 * config.n_head) or config.n_head % config.n_kv_head:
        raise ValueError(f"d_model={config.d_model} must be a multiple of 2 x n_head={config.n_head}, "
                         f"and n_head of n_kv_head={config.n_kv_head}")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    shape = {name: getattr(config, name) for name in names if hasattr(config, name)}
    ids = {"vocab_size": vocab.size, "streams": vocab.streams, "text": vocab.text, "n_special": N_SPECIAL,
           "published": vocab.published}
    return Model(ModelConfig(**ids, **shape), dtype)


def checkpoints(out_dir):
    """Complete checkpoint folders of a run, oldest first. A folder gets this name only once it is whole."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, name) for name in sorted(names) if re.fullmatch(r"step_\d{7}", name)]


def empty_model(config, vocab, dtype=torch.float32, device="cpu"):
    """`make_model` without a stop at PyTorch's default weights: memory that holds anything."""
    with torch.device("meta"):
        model = make_model(config, vocab, dtype)
    return model.to_empty(device=device)


def checkpoint_weights(folder, model):
    """A checkpoint folder of ours as {name: function that reads it}; an error names what does not fit."""
    found = list_tensors(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = misfits({name: shape for name, (_, shape) in found.items()}, shapes)
    if wrong:
        raise ValueError(f"{folder} holds another model than the configuration's: {some(wrong)}")
    return {name: (lambda name=name: read_tensor(found[name][0], name)) for name in shapes}


def newest(folder):
    """A checkpoint's folder itself, or the newest of a run's; None if it is neither."""
    if os.path.isfile(f"{folder}/state.json"):
        return folder
    found = checkpoints(folder)
    return found[-1] if found else None


def same_vocab(vocab, theirs, folder):
    """The data's vocabulary as a model with the vocabulary `theirs` has it: the same sizes, its quirks."""
    ours = dataclasses.replace(vocab, n_tail=theirs.n_tail, published=theirs.published)
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


def starting_weights(config, vocab):
    """What `init_from` names as {name: function that reads it}: checked, but not read yet."""
    with torch.device("meta"):
        model = make_model(config, vocab)
    folder = newest(config.init_from)
    if folder:
        return checkpoint_weights(folder, model)
    return start_weights(config.init_from, model.config, vocab, config.seed)


def save_model(folder, config, vocab, model, state):
    """What a checkpoint and an export have in common: model.safetensors, config.json, state.json."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, f"{folder}/model.safetensors")
    save_config(config, f"{folder}/config.json")
    with open(f"{folder}/state.json", "w") as f:
        json.dump({"vocab": dataclasses.asdict(vocab), **state}, f, indent=1)


def save_checkpoint(config, vocab, model, optimizers, step, state):
    """Write out_dir/step_NNNNNNN beside its place, then rename: weights, optimizers, config, state."""
    final = os.path.join(config.out_dir, f"step_{step:07d}")
    temporary = final + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    save_model(temporary, config, vocab, model, {"step": step, **state})
    torch.save([optimizer.state_dict() for optimizer in optimizers], f"{temporary}/optimizer.pt")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    for old in checkpoints(config.out_dir)[:-config.keep_last]:
        shutil.rmtree(old)


def fill(model, weights):
    """Fill a model, whole or sharded, from {name: function that reads it}, one tensor at a time."""
    for name, tensor in model.state_dict().items():
        put(tensor, weights[name]())


def load_optimizers(folder, optimizers):
    for optimizer, state in zip(optimizers, torch.load(f"{folder}/optimizer.pt", weights_only=True)):
        optimizer.load_state_dict(state)


def read_state(folder):
    """state.json of a checkpoint, with its vocab as a Vocab."""
    with open(f"{folder}/state.json") as f:
        state = json.load(f)
    return state | {"vocab": Vocab(**state["vocab"])}


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
        config, state = read_config(f"{found}/config.json"), read_state(found)
        vocab = state["vocab"]
        with torch.device("meta"):
            weights = checkpoint_weights(found, make_model(config, vocab))
    with torch.device("meta"):
        model = make_model(config, vocab, dtype).to(dtype)
    model.to_empty(device=device)
    fill(model, weights)
    return model.eval().requires_grad_(False), config, vocab, state
