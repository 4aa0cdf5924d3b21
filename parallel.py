"""Processes and devices: everything around the model that makes it run on one machine or many.

Ninth file of the reading order. Parallelism is applied from here, model.py knows nothing of it: every worker
takes its rows of the global batch, and FSDP2 (torch.distributed.fsdp.fully_shard) shares out the rest:

      worker 0      rows 0, 2   |   half of each matrix, of its gradient and of its AdamW moments
      worker 1      rows 1, 3   |   the other half
                                    a block's matrices are whole only while the block computes

A small model on a CPU is faster with whole copies (shard=1): one message a step instead of three a block.
"""
import contextlib
import ctypes
import dataclasses
import datetime
import importlib.util
import os
import resource
import shutil
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from attention import attend_flash, attend_varlen
from interleave import N_SPECIAL
from model import Model, ModelConfig

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


def start_workers(timeout_s=600.0):
    """Join the process group that torchrun made, if it did. Returns (rank, world size, device).

    timeout_s: a worker that waits longer than this for another gives up, so that nothing hangs for ever.
    """
    device = torch.device("cpu")
    keep_freed_memory()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return 0, 1, device
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                         "environment, or restarted workers look for dead ones")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    return dist.get_rank(), dist.get_world_size(), device


def total(values):
    """Sum a small list of numbers over all workers, in the same order everywhere."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def sum_gradients(params, sharded):
    """What no batch needed gets a gradient of 0; and where every worker holds the whole model, the gradients
    are summed over the workers, as one flat message. (Sharded ones were, in the backward pass.)"""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized() and not sharded:
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, grad in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


@contextlib.contextmanager
def signals():
    """Within, SIGTERM and SIGINT are only noted, in the list that this gives; a second one stops at once."""
    noted = []

    def note(number, _):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device):
    """The most memory in MB that this process has had so far: of its GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


# ---- model -------------------------------------------------------------------------------------------------

def meta_model(config, vocab, dtype=torch.float32):
    """The Config's model for a Vocab without memory: names and shapes only."""
    if config.model_type not in ("llama", "olmo2"):
        raise ValueError(f"model_type is 'llama' or 'olmo2', not {config.model_type!r}")
    if config.d_model % (2 * config.n_head) or config.n_head % config.n_kv_head:
        raise ValueError(f"d_model={config.d_model} must be a multiple of 2 x n_head={config.n_head}, "
                         f"and n_head of n_kv_head={config.n_kv_head}")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    shape = {name: getattr(config, name) for name in names if hasattr(config, name)}
    ids = {"vocab_size": vocab.size, "streams": vocab.streams, "text": vocab.text, "n_special": N_SPECIAL,
           "published": vocab.published}
    with torch.device("meta"):
        return Model(ModelConfig(**ids, **shape), dtype)


def empty_model(config, vocab, dtype=torch.float32, device="cpu"):
    """The Config's model in memory that holds anything: without a stop at PyTorch's default weights."""
    return meta_model(config, vocab, dtype).to_empty(device=device)


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


def worker_mesh(config, device):
    """All workers, in copies of config.shard workers that share one model: FSDP2, or HSDP if several."""
    world, share = dist.get_world_size(), config.shard or dist.get_world_size()
    if world % share:
        raise ValueError(f"shard={share}: {world} workers are not a multiple of it")
    if share == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // share, share), mesh_dim_names=("copy", "shard"))


def shard(model, mesh):
    """Share a model out over the workers of a mesh, in place: each keeps a part of every parameter.

    A worker gathers the whole of a block just before it is used, in the dtype of the activations, and frees
    it after; gradients are summed (not averaged: train.py divides once, by the frames of all workers) into
    the parts, in fp32. emb, lm_head, head_emb and the last norm stay whole from the forward pass to the end
    of the backward pass, since the loss uses them outside of the model.
    """
    low = model.dtype if model.dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def local(tensor):
    """This worker's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """All of a sharded tensor, on every worker; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(param, tensor):
    """Of a whole tensor, what this worker keeps of the parameter that it is for."""
    if not isinstance(param, DTensor):
        return tensor
    tensor = tensor.to(param.device)
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None).to_local()


def put(param, tensor):
    """Copy a whole tensor into a parameter, whole or sharded."""
    local(param).detach().copy_(own_part(param, tensor))


# ---- speed -------------------------------------------------------------------------------------------------

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


def gemm_peak(dtype, device="cpu", seconds=1.0, size=2048):
    """FLOP/s that a large matrix product reaches here with all threads of this process."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    a @ b
    best, end = 0.0, time.time() + seconds
    while time.time() < end:
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * size ** 3 / (time.perf_counter() - began))
    return best


def training_flops(c, n_frame, lengths, n_text, n_speech, n_acoustic, scope):
    """FLOPs of matrix products, forward and backward, that documents of these lengths ask of a ModelConfig c.

    n_frame: their frames, without padding.  n_text, n_speech: frames with a stream-0 target in a text or
    speech segment, n_acoustic: with acoustic targets. Attention counts causal pairs only; a stream's head
    embedding is a bias, and costs nothing.
    """
    D, E = c.d_model, c.d_model // c.n_head
    block = 2 * D * D + 2 * D * c.n_kv_head * E + 3 * D * c.d_ff
    attention = sum(T * (T + 1) * D for T in lengths)                       # scores and their mixture
    if scope == "original":
        heads = (n_text + n_speech) * c.vocab_size
    else:
        heads = n_text * (c.n_special + c.text[1] - c.text[0]) + n_speech * c.streams[0][1]
        heads += n_acoustic * (c.streams[-1][1] - c.streams[0][1])
    return 6 * (c.n_layer * (block * n_frame + attention) + heads * D)
