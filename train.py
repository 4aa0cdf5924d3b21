"""Train: the one loop.

Eleventh file of the reading order.
  python train.py configs/numbers.py                       the whole main job: prepare, train, evaluate
  python train.py configs/numbers.py --max_steps=20 --out_dir=out/try --corpus_utterances=200
  python train.py configs/numbers.py --resume              go on from the newest whole checkpoint
  torchrun --nproc_per_node=2 train.py configs/numbers.py  only the training, on data already prepared
The schedule is the paper's warmup-decay (arXiv 2506.17611, section 3): warm up, hold, decay linearly.
SIGTERM and Ctrl-C save a checkpoint and end.
"""
import dataclasses
import importlib.util
import math
import os
import signal
import sys

import torch
import torch.distributed as dist

import prepare
from checkpoint import Saver, checkpoints, newest, newest_whole, resume, starting_vocab, starting_weights
from config import load_config, other_settings, read_config
from data import Dataset, Loader, open_data
from heads import batch_loss, mean_losses
from interleave import SPEECH, Vocab
from job import report, run_stage
from log import Log, no_progress
from model import initial_weight
from muon import Muon
from parallel import (
    compute_dtype,
    gemm_peak,
    meta_model,
    prepare_for_speed,
    put,
    shard,
    signals,
    start_workers,
    sum_gradients,
    total,
    training_flops,
    whole,
    worker_mesh,
)
from plot import plot_curves
from tokenize_audio import Tokenizer
from tokenize_text import KINDS, make_text_tokenizer


def learning_rate(config, step):
    """Factor on the peak rate: linear warmup, constant, linear decay to final_lr at max_steps."""
    warmup, decay = config.warmup * config.max_steps, config.decay * config.max_steps
    left = min(1.0, (config.max_steps - step) / max(decay, 1))
    return min((step + 1) / max(warmup, 1), config.final_lr + (1 - config.final_lr) * left)


def make_optimizers(config, model, dtype):
    """Muon for the blocks' matrices (their gradients act as maps), AdamW for embeddings, heads and norms."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2] if config.muon_lr > 0 else []
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    optimizers = [torch.optim.AdamW(others, config.lr, betas, weight_decay=decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.muon_lr, 0.95, config.muon_iterations, decay, dtype))
    return optimizers


@torch.no_grad()
def held_out_losses(model, loaders, config, rank, world, n_batch=8):
    """Mean losses of the first batches of a held-out split, the same ones every time, task by task (a text
    costs several times what it costs after its speech) -> {"asr text": nats, "tts semantic": ...}."""
    found = {}
    for task, loader in loaders.items():
        sums = 0.0
        for step in range(-(-n_batch // len(loaders))):
            batch = loader.batch(step, range(rank, config.batch_rows, world))
            sums = torch.tensor(batch_loss(model, batch, config.softmax)[1], dtype=torch.float64) + sums
        means = mean_losses(total(sums.tolist()), loader.vocab.stream_names)
        found |= {f"{task} {name}": nats for name, nats in means.items()}
    return found


def check_start(config):
    """Look at what `init_from` names before hours go into preparing data for it."""
    if config.init_from and not newest(config.init_from):
        if config.text_model in KINDS:
            raise ValueError(f"{config.init_from} has its own text tokens: set text_model='base'")
        n_text = make_text_tokenizer([], config.text_model, 0).n_text
        t = Tokenizer.load(config.audio_tokenizer) if config.audio_tokenizer else config
        vocab = Vocab(t.n_semantic, t.n_acoustic, t.n_level, n_text)
        vocab, _ = vocab.only(config.token_streams)
        starting_weights(config, starting_vocab(config.init_from, vocab))


def check(config, dataset, world, going_on=False):
    """Whatever can be wrong with a run, found before its workers start; ValueError says what to change.
    Returns what fills a model from `init_from`, if that is where it starts."""
    if config.batch_rows % (world * config.grad_accum):
        raise ValueError(f"batch_rows={config.batch_rows} can't be shared by {world} workers "
                         f"x grad_accum={config.grad_accum}")
    if config.softmax not in ("grammar", "original"):
        raise ValueError(f"softmax is 'grammar' or 'original', not {config.softmax!r}")
    if min(config.curriculum.values(), default=1) <= 0 or sum(config.curriculum.values()) > 1:
        raise ValueError(f"curriculum={config.curriculum}: shares of the steps are above 0, and 1 in all at "
                         "most")
    if config.delay not in (0, 1):
        raise ValueError(f"delay is 1, or 0 for none, not {config.delay}")
    if config.delay != dataset.vocab.delay:
        raise ValueError(f"delay={config.delay}, but {going_on or config.init_from} learned with "
                         f"{dataset.vocab.delay}")
    if config.new_rows != 1 and config.shard != 1 and world > 1:
        raise ValueError("new_rows needs whole copies of the model on each worker: --shard=1")
    ours = newest(config.init_from)
    if config.rows_from_text and not going_on and (ours or not config.init_from):
        raise ValueError("rows_from_text is for a start from a text LLM, which init_from does not name: "
                         "--rows_from_text=False")
    if config.moments and not going_on and not ours:
        raise ValueError("moments are a run's of ours, which init_from does not name: --moments=False")
    compute_dtype(config.dtype, torch.device("cpu"))
    Loader(dataset, config)
    meta_model(config, dataset.vocab)
    if config.track and not importlib.util.find_spec(config.track):
        raise ValueError(f"track={config.track!r} is not installed: pip install {config.track}")
    if config.init_from and not going_on:
        return starting_weights(config, dataset.vocab, dataset.folder)
    return None


def counts(batch, config, c):
    """What a batch has of: frames with a stream-0 target, frames, FLOPs of its matrix products."""
    first, acoustic = batch.weight[..., 0] > 0, (batch.weight[..., 1:] > 0).any(-1)         # (R, S)
    n_target, n_speech = int(first.sum()), int((first & (batch.modality == SPEECH)).sum())
    lengths = [length for row in batch.lengths for length in row]
    return n_target, batch.n_frame, training_flops(c, batch.n_frame, lengths, n_target - n_speech, n_speech,
                                                   int(acoustic.sum()), config.softmax)


def train(config, folder, going_on=False):
    """Train on the prepared data in `folder`, from scratch or, going_on, from out_dir's newest checkpoint ->
    the number of the signal that ended it before the last step, or None."""
    # workers, data, and where we start
    rank, world, device = start_workers(config.timeout_s)
    say = print if rank == 0 else (lambda *_: None)
    dataset = open_data(config, folder, rank == 0)
    known, new = (Dataset(folder, split, rank == 0, config.token_streams) for split in prepare.SPLITS[1:])
    found = newest_whole(config.out_dir, rank, world, say) if going_on else None
    if going_on and not found and not checkpoints(config.out_dir):
        say(f"no checkpoint in {config.out_dir} yet: from the start")
    if checkpoints(config.out_dir) and not found:
        raise ValueError(occupied(config.out_dir) if not going_on else
                         f"no checkpoint in {config.out_dir} is whole: delete them to start again")
    dataset.vocab = known.vocab = new.vocab = starting_vocab(found or config.init_from, dataset.vocab)
    fill_start = check(config, dataset, world, found)
    loader = Loader(dataset, config)
    held_out = {task: Loader(split, dataclasses.replace(config, mixture={task: 1.0}), held_out=True)
                for split in (new, known)       # of known voices, unless the corpus has new ones only
                for task in loader.tasks if len(split.able(task))}

    # the model: made without memory, shared out over the workers, then filled
    dtype = compute_dtype(config.dtype, device)
    model = prepare_for_speed(meta_model(config, dataset.vocab, dtype), config, device, say)
    sharded = dist.is_initialized() and config.shard != 1       # else each worker holds all of it
    if sharded:
        shard(model, worker_mesh(config, device))
    model.to_empty(device=device)
    optimizers, params = make_optimizers(config, model, dtype), list(model.parameters())
    state = {"step": 0, "frames": 0, "seconds": 0.0, "skipped": 0}
    if found:
        say(f"resuming {found}{other_settings(read_config(f'{found}/config.json'), config)}")
        was = resume(found, model, optimizers, rank)
        state = {name: was[name] for name in state}
    elif fill_start:
        fill_start(model)
        if config.moments:
            resume(newest(config.init_from), model, optimizers, rank)
        say(f"weights of {config.init_from}")
    else:
        generator = torch.Generator(device).manual_seed(config.seed)
        for name, p in model.named_parameters():
            put(p, initial_weight(model.config, name, p.shape, generator, device))

    # the run's folder, which is enough for sample.py
    if rank == 0:
        os.makedirs(config.out_dir, exist_ok=True)
        for name in ("audio_tokenizer", "text_tokenizer"):
            prepare.copy_folder(f"{folder}/{name}", f"{config.out_dir}/{name}")
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {world} worker(s) on {device.type}, "
        f"activations {str(dtype)[6:]}, {config.batch_rows} rows of {config.row_frames} frames a step")
    [peak] = total([gemm_peak(dtype, device, 0.3)])
    saver = Saver(config, dataset.vocab, rank, world)
    log = Log(config, dataset.vocab.stream_names, state, peak, device, rank)

    tables = (model.emb, model.lm_head) if config.new_rows != 1 else ()
    fast = [p.data[:dataset.vocab.text_start] for p in tables]
    bad, stop = 0, False
    with signals() as noted:
        while state["step"] < config.max_steps and not stop:
            factor = learning_rate(config, state["step"])
            for optimizer, rate in zip(optimizers, (config.lr, config.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor

            rows = range(rank, config.batch_rows, world)        # this worker's share of the global batch
            n, sums = len(rows) // config.grad_accum, 0.0
            for micro in range(config.grad_accum):
                batch = loader.batch(state["step"], rows[micro * n:(micro + 1) * n])
                if sharded:                                     # gradients travel once, after the last
                    model.set_requires_gradient_sync(micro == config.grad_accum - 1)
                loss, part = batch_loss(model, batch, config.softmax)
                loss.backward()
                part = [*part, float(loss.detach()), *counts(batch, config, model.config)]
                sums = torch.tensor(part, dtype=torch.float64) + sums
            sums = total([*sums.tolist(), len(noted), saver.failed()])
            *sums, loss, n_target, n_frame, flops, stop, failed = sums
            n_target = max(n_target, 1)
            sum_gradients(params, sharded)
            for p in params:
                p.grad /= n_target          # frames with a stream-0 target, over all workers and micro-steps
            length = torch.nn.utils.get_total_norm([p.grad for p in params])
            norm, loss = float(whole(length)), loss / n_target

            if math.isfinite(loss) and math.isfinite(norm):
                torch.nn.utils.clip_grads_with_norm_(params, config.clip, length)
                before = [rows.clone() for rows in fast]
                for optimizer in optimizers:
                    optimizer.step()
                for rows, old in zip(fast, before):
                    rows.add_(rows - old, alpha=config.new_rows - 1)
                bad = 0
            else:
                bad, state["skipped"] = bad + 1, state["skipped"] + 1
                log.say(f"step {state['step'] + 1}: loss {loss}, gradient norm {norm}: skipped")
                if bad == config.max_bad_steps:
                    no_progress(config, model, loader, state["step"], norm, mean_losses(sums, log.names))
            for p in params:
                p.grad = None
            state["step"], state["frames"] = state["step"] + 1, state["frames"] + int(n_frame)

            last = state["step"] == config.max_steps
            row = log.step(state, sums, loss, norm, factor * config.lr, flops, last or stop)
            if held_out and config.eval_every and (state["step"] % config.eval_every == 0 or last):
                losses = held_out_losses(model, held_out, config, rank, world)
                row = (row or {name: state[name] for name in ("step", "frames")}) | {"held_out": losses}
                if sharded:
                    model.reshard()
            log.write(row)
            if failed or state["step"] % config.save_every == 0 or last or stop:
                saver.start(model, optimizers, state | {"workers": world, "data": os.path.abspath(folder)})
            log.go()
    saver.finish()
    log.close()
    if rank == 0:
        plot_curves(config.out_dir)
    speed = state["frames"] / max(state["seconds"], 1e-9)
    say(f"trained {state['step']} steps, {state['frames'] / 1e6:.2f}M frames in {state['seconds']:.0f} s: "
        f"{speed:.0f} frames/s")
    if dist.is_initialized():
        dist.barrier()              # nobody hangs up while another still talks
        dist.destroy_process_group()
    if stop and state["step"] < config.max_steps:
        number = noted[0] if noted else signal.SIGTERM
        say(f"{signal.Signals(number).name}: step {state['step']} is saved, go on with --resume")
        return number
    return None


def occupied(out_dir):
    return f"{out_dir} holds a run already: add --resume, choose another --out_dir, or delete it"


# ---- the whole job: prepare, train, evaluate, each in processes of its own ---------------------------------

def data_of(config, settings):
    """The folder of prepared data that a run reads: the one it names, else that of its settings."""
    if config.data and config.datasets:
        raise ValueError("name the data once: data, or datasets with their weights")
    return config.data or next(iter(config.datasets), "") or prepare.data_folder(config.data_dir, settings)


def whole_job(config, arguments, settings, going_on):
    """Prepare the data where missing, train with one process per core, evaluate, and say what is where."""
    here, peak, seconds = os.path.dirname(os.path.abspath(__file__)), [0.0], {"prepare": 0.0}
    found = going_on and checkpoints(config.out_dir)
    if not found:
        check_start(config)
    folder = data_of(config, settings)
    for named in filter(None, (config.data, *config.datasets, *config.curriculum)):
        if not prepare.is_prepared(named):
            raise ValueError(f"{named} holds no prepared data")
    if not prepare.is_prepared(folder):
        flags = [f"--{name}={value}" for name, value in settings.items()] + [f"--data_dir={config.data_dir}"]
        seconds["prepare"] = run_stage("prepare.py", [sys.executable, f"{here}/prepare.py", *flags], peak)
    workers = config.workers or torch.cuda.device_count() or min(os.cpu_count() or 1, config.batch_rows)
    while workers > 1 and config.batch_rows % (workers * config.grad_accum) and not config.workers:
        workers -= 1
    dataset = open_data(config, folder)
    dataset.vocab = starting_vocab(found[-1] if found else config.init_from, dataset.vocab)
    check(config, dataset, workers, found)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    launch = launch if workers > 1 or torch.cuda.is_available() else [sys.executable]
    seconds["train"] = run_stage("training", [*launch, f"{here}/train.py", "--worker", *arguments], peak)
    seconds["eval"] = run_stage("eval.py", [sys.executable, f"{here}/eval.py", config.out_dir], peak)

    voices = (path for split in ("unseen", "seen", "train") for path in Dataset(folder, split).info["audio"])
    report(config.out_dir, seconds, peak, next(filter(None, voices), "voice.wav"))


def main(arguments):
    going_on, worker = "--resume" in arguments, "--worker" in arguments or "RANK" in os.environ
    config = load_config([a for a in arguments if a not in ("--resume", "--worker")])
    settings = {name: getattr(config, name) for name in prepare.SETTINGS}
    if worker:
        folder = data_of(config, settings)
        if not prepare.is_prepared(folder):
            raise ValueError(f"{folder}, the data of this configuration, is not there: run prepare.py first")
        number = train(config, folder, going_on)
        leave(128 + number if number else 0)
    else:
        if checkpoints(config.out_dir) and not going_on:
            raise ValueError(occupied(config.out_dir))
        whole_job(config, arguments, settings, going_on)


def leave(code):
    """End this process. A worker among others skips the interpreter's teardown, in which gloo's threads abort
    now and then ("terminate called without ...")."""
    sys.stdout.flush()
    sys.stderr.flush()
    (os._exit if "RANK" in os.environ else sys.exit)(code)


def run(main):
    """Run a script's main with what stands after its name; what is wrong is said in one line."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        leave(2)
    except RuntimeError as problem:
        if not (isinstance(problem, dist.DistError) or "gloo" in str(problem)):
            raise
        print("train.py: a worker lost contact with another, which ended or hung; its message is above if it "
              f"had one ({str(problem).splitlines()[0]}). Go on with --resume", file=sys.stderr)
        leave(1)


if __name__ == "__main__":
    run(main)
