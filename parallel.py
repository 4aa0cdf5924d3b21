"""Processes, devices and checkpoints: everything around the model that is not the model.

Seventh file of the reading order. Parallelism is applied from here, model.py knows nothing of it: every
worker holds the whole model, takes its rows of the global batch, and the gradients are summed over workers.
"""
import dataclasses
import json
import os
import re
import shutil

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from config import read_config, save_config
from interleave import N_SPECIAL, Vocab
from model import Model, ModelConfig

# ---- processes ---------------------------------------------------------------------------------------------

def start_workers():
    """Join the process group that torchrun made, if it did. Returns (rank, world size, device)."""
    device = torch.device("cpu")
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
    """Sum the gradients over the workers, as one flat message."""
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


# ---- model and checkpoints ---------------------------------------------------------------------------------

def make_model(config, vocab, dtype=torch.float32):
    """The Config's model for a Vocab, weights not initialised."""
    if config.d_model % (2 * config.n_head) or config.n_head % config.n_kv_head:
        raise ValueError(f"d_model={config.d_model} must be a multiple of 2 x n_head={config.n_head}, "
                         f"and n_head of n_kv_head={config.n_kv_head}")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    shape = {name: getattr(config, name) for name in names if hasattr(config, name)}
    ids = {"vocab_size": vocab.size, "streams": vocab.streams, "n_special": N_SPECIAL}
    return Model(ModelConfig(**ids, **shape), dtype)


def checkpoints(out_dir):
    """Complete checkpoint folders of a run, oldest first. A folder gets this name only once it is whole."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, name) for name in sorted(names) if re.fullmatch(r"step_\d{7}", name)]


def save_checkpoint(config, vocab, model, optimizers, step, state):
    """Write out_dir/step_NNNNNNN beside its place, then rename: weights, optimizers, config, state."""
    final = os.path.join(config.out_dir, f"step_{step:07d}")
    temporary = final + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, f"{temporary}/model.safetensors")
    torch.save([optimizer.state_dict() for optimizer in optimizers], f"{temporary}/optimizer.pt")
    save_config(config, f"{temporary}/config.json")
    with open(f"{temporary}/state.json", "w") as f:
        json.dump({"step": step, "vocab": dataclasses.asdict(vocab), **state}, f, indent=1)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    for old in checkpoints(config.out_dir)[:-config.keep_last]:
        shutil.rmtree(old)


def load_weights(folder, model):
    """Fill the model from a checkpoint folder; an error names what does not fit."""
    weights, own = load_file(f"{folder}/model.safetensors"), model.state_dict()
    wrong = sorted(set(weights) ^ set(own)) + [
        f"{name}: {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{folder} holds another model than the configuration's: {'; '.join(wrong[:5])}")
    model.load_state_dict(weights)


def load_optimizers(folder, optimizers):
    for optimizer, state in zip(optimizers, torch.load(f"{folder}/optimizer.pt", weights_only=True)):
        optimizer.load_state_dict(state)


def read_state(folder):
    """state.json of a checkpoint, with its vocab as a Vocab."""
    with open(f"{folder}/state.json") as f:
        state = json.load(f)
    return state | {"vocab": Vocab(**state["vocab"])}


def load_model(folder, device="cpu"):
    """A run's folder (its newest checkpoint) or a checkpoint's -> (inference model, Config, Vocab, state)."""
    if not os.path.exists(f"{folder}/state.json"):
        found = checkpoints(folder)
        if not found:
            raise ValueError(f"{folder} holds no checkpoint: train first, python train.py configs/numbers.py")
        folder = found[-1]
    config, state = read_config(f"{folder}/config.json"), read_state(folder)
    model = make_model(config, state["vocab"])
    load_weights(folder, model)
    return model.to(device).eval().requires_grad_(False), config, state["vocab"], state
