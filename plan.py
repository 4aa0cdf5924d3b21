"""Plan: what a run will take, before anyone rents a GPU for it.

Helper, outside the reading order:
  python plan.py configs/7b.py --gpus=8              parameters, FLOPs, memory of a GPU by part, days, disk
  python plan.py configs/7b.py --gpus=24 --batch_rows=120 --grad_accum=5 --mfu=0.45
  python plan.py configs/numbers.py --measure        the same step for real in one process, beside the plan
No GPU is needed: the sharded model, its forward and backward pass, loss and AdamW run on tensors that have
shapes but no memory (FakeTensorMode), with collectives that do nothing, and PyTorch's FSDPMemTracker adds up
what would be alive at once. Fragmentation, the CUDA context and NCCL's buffers come on top.
"""
import argparse
import ctypes
import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F

from checkpoint import make_state
from config import load_config
from heads import LinearCrossEntropy
from interleave import Vocab
from parallel import meta_model, shard, training_flops, worker_mesh
from script import run_script

DOCUMENT = 512              # frames of a document, three quarters of them speech
HOURS, FRAME_HZ = 213_000, 50                       # of speech in the paper


def attend_causal(q, k, v, lengths):
    """Causal attention of each document, with the memory of FlashAttention: q (S, H, E) -> (S, H, E)."""
    parts = []
    for one in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v))):              # 3 of (H, T, E)
        q, k, v = (x[None] for x in one)
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0])
    return torch.cat(parts, 1).transpose(0, 1)


def loss_of(model, hidden, scope):
    """`heads.weighted_loss` where every frame has a target, three quarters of them speech, without values."""
    c, (S, _) = model.config, hidden.shape
    K = c.n_stream - 1
    window = (c.streams[1][0], c.streams[-1][1]) if K else (0, 0)
    bias = model.head_emb[1:] @ model.lm_head[slice(*window)].T             # (K, codes of all streams)
    table, prefix = (model.lm_head, c.vocab_size) if scope == "original" else (
        model.lm_head[:c.streams[-1][1]], c.streams[0][1])
    if scope == "grammar" and K:
        bias = bias[:, :(window[1] - window[0]) // K]
    target, weight = torch.zeros(S, c.n_stream, dtype=torch.long), torch.ones(S, c.n_stream)
    return LinearCrossEntropy.apply(hidden[torch.arange(S)], table, None, bias, target, weight,
                                    S * 3 // 4 if K else 0, prefix, window, True)[0]


def build(config, vocab, mesh, dtype):
    model = meta_model(config, vocab, dtype)
    model.attend, model.checkpointing = attend_causal, config.checkpointing
    shard(model, mesh).to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, foreach=False)
    make_state(optimizer)
    return model, optimizer


def step(config, model, optimizer, n_frame):
    """One training step on n_frame frames."""
    tokens = torch.randint(model.config.vocab_size, (n_frame, model.config.n_stream))
    lengths = [DOCUMENT] * (n_frame // DOCUMENT) + [n_frame % DOCUMENT] * (n_frame % DOCUMENT > 0)
    loss_of(model, model(tokens, lengths), config.softmax).backward()
    torch.nn.utils.clip_grad_norm_(list(model.parameters()), config.clip, foreach=False)
    optimizer.step()
    optimizer.zero_grad()


def plan_memory(config, vocab, gpus, n_frame, dtype=torch.bfloat16):
    """{part: bytes} of one GPU at the moment when the most is alive; "Total" is their sum."""
    from torch._subclasses import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = worker_mesh(config, torch.device("cpu"))
    with FakeTensorMode():
        small = dataclasses.replace(config, n_layer=1)      # DTensor works out each operation once, with
        step(small, *build(small, vocab, mesh, dtype), n_frame)     # tensors that the tracker would count
        model, optimizer = build(config, vocab, mesh, dtype)
        with FSDPMemTracker(model, optimizer) as tracker:
            step(config, model, optimizer, n_frame)
    dist.destroy_process_group()
    [parts] = tracker.get_tracker_snapshot("peak").values()
    return {getattr(part, "value", part): size for part, size in parts.items()}


def resident(field):
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(field))


def measure_memory(config, vocab, n_frame, dtype=torch.float32):
    """Bytes that the second of two real steps needs at its peak, in this process alone (resident, glibc)."""
    ctypes.CDLL(None).mallopt(-3, 2 ** 16)                  # M_MMAP_THRESHOLD: freed blocks go back at once
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = worker_mesh(config, torch.device("cpu"))
    small = dataclasses.replace(config, n_layer=1)          # loads what PyTorch loads when first needed
    step(small, *build(small, vocab, mesh, dtype), 16)
    before = resident("VmRSS")
    model, optimizer = build(config, vocab, mesh, dtype)
    step(config, model, optimizer, n_frame)
    step(config, model, optimizer, n_frame)
    dist.destroy_process_group()
    return resident("VmHWM") - before


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, add_help=True,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a file of configs/; its settings can be given too, --name=value")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--n_text", type=int, help="text tokens (default: of SmolLM2, of OLMo-2, or 50)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU (default: H100, bf16)")
    parser.add_argument("--measure", action="store_true", help="one process for real, beside the plan for it")
    args, settings = parser.parse_known_args(arguments)
    config = load_config([args.config, *settings])
    gpus = 1 if args.measure else args.gpus
    dtype = torch.float32 if args.measure else torch.bfloat16
    known = {"llama": 49_152, "olmo2": 100_352}[config.model_type] if config.init_from else 50
    vocab = Vocab(config.n_semantic, config.n_acoustic, config.n_level, args.n_text or known)
    vocab, _ = vocab.only(config.token_streams)
    if config.batch_rows % (gpus * config.grad_accum) and not args.measure:
        raise ValueError(f"batch_rows={config.batch_rows} can't be shared by {gpus} GPUs x "
                         f"grad_accum={config.grad_accum}")
    rows = max(1, config.batch_rows // (gpus * config.grad_accum))
    n_frame = rows * config.row_frames
    model = meta_model(config, vocab)
    count = sum(p.numel() for p in model.parameters())
    tables = model.emb.numel() + model.lm_head.numel()
    lengths, speech = [DOCUMENT] * (n_frame // DOCUMENT), n_frame * 3 // 4
    flops = training_flops(model.config, n_frame, lengths, n_frame - speech, speech, speech, config.softmax)
    batch = config.batch_rows * config.row_frames
    frames = batch * config.max_steps
    days = frames * flops / n_frame / (gpus * args.peak * args.mfu) / 86400
    print(f"""{args.config} on {gpus} GPU(s), {str(dtype)[6:]} activations, weights and AdamW in fp32
parameters        {count / 1e6:,.1f}M, {tables / 1e6:,.1f}M of them tables of {vocab.size:,} rows
work              {flops / n_frame / 1e9:.2f} GFLOP a frame, forward and backward
a step            {batch:,} frames: {gpus} GPU(s) x {config.grad_accum} micro-step(s) x {rows} row(s) of """
          f"""{config.row_frames:,}
a GPU, at once    {n_frame:,} frames, activations {'recomputed' if config.checkpointing else 'kept'}""")
    parts = plan_memory(config, vocab, gpus, n_frame, dtype)
    for name, size in parts.items():
        if size > 2 ** 20:
            print(f"  {name:18s} {size / 2 ** 30:8.2f} GiB")
    if args.measure:
        real = measure_memory(config, vocab, n_frame)
        return print(f"  measured           {real / 2 ** 30:8.2f} GiB, the plan is "
                     f"{100 * (parts['Total'] / real - 1):+.1f} % off")
    print(f"""the whole run     {frames:.3g} frames in {config.max_steps:,} steps: {days:.1f} days at """
          f"""{100 * args.mfu:.0f} % of {args.peak / 1e12:.0f} TFLOP/s a GPU
disk              {12 * count / 2 ** 30:.1f} GiB a checkpoint; {HOURS:,} hours of speech as shards: """
          f"""{HOURS * 3600 * FRAME_HZ * vocab.n_stream * 2 / 1e9:,.0f} GB""")


if __name__ == "__main__":
    run_script(main)
