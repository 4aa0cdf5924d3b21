"""Train: the one loop.

Tenth file of the reading order.
  python train.py configs/numbers.py                       the whole main job: prepare, train, evaluate
  python train.py configs/numbers.py --max_steps=20 --out_dir=out/try --corpus_utterances=200
  python train.py configs/numbers.py --resume              go on from the newest checkpoint
  torchrun --nproc_per_node=2 train.py configs/numbers.py  only the training, on data already prepared
The schedule is the paper's warmup-decay (arXiv 2506.17611, section 3): warm up, hold, decay linearly.
"""
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
from config import load_config, save_config
from data import Dataset, Loader
from heads import batch_loss, mean_losses
from interleave import Vocab
from muon import Muon
from parallel import (
    checkpoint_weights,
    checkpoints,
    compute_dtype,
    empty_model,
    fill,
    load_optimizers,
    make_model,
    newest,
    prepare_for_speed,
    read_state,
    save_checkpoint,
    start_workers,
    starting_vocab,
    starting_weights,
    sum_gradients,
    total,
)
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


def make_loader(config, dataset):
    c = config
    return Loader(dataset, c.mixture, c.batch_rows, c.row_frames, c.prompt_len, c.seed, c.special_weight,
                  c.loss_region)


@torch.no_grad()
def held_out_losses(model, loader, config, rank, world, n_batch=4):
    """Mean losses of the first batches of a held-out split, the same ones every time."""
    sums = None
    for step in range(n_batch):
        _, part = batch_loss(model, loader.batch(step, range(rank, config.batch_rows, world)), config.softmax)
        sums = part if sums is None else [a + b for a, b in zip(sums, part)]
    return mean_losses(total(sums), loader.vocab.stream_names)


def check_start(config):
    """Look at what `init_from` names before hours go into preparing data for it."""
    if config.init_from and not newest(config.init_from):
        if config.text_model in KINDS:
            raise ValueError(f"{config.init_from} has its own text tokens: set text_model='base'")
        n_text = make_text_tokenizer([], config.text_model, 0).n_text
        vocab = Vocab(config.n_semantic, config.n_acoustic, config.n_level, n_text)
        vocab, _ = vocab.only(config.token_streams)
        starting_weights(config, starting_vocab(config.init_from, vocab))


def check(config, dataset, world, resume=False):
    """Whatever can be wrong with a run, found before its workers start; ValueError says what to change."""
    if config.batch_rows % (world * config.grad_accum):
        raise ValueError(f"batch_rows={config.batch_rows} can't be shared by {world} workers "
                         f"x grad_accum={config.grad_accum}")
    if config.softmax not in ("grammar", "original"):
        raise ValueError(f"softmax is 'grammar' or 'original', not {config.softmax!r}")
    compute_dtype(config.dtype, torch.device("cpu"))
    make_loader(config, dataset).plan(0)
    with torch.device("meta"):
        make_model(config, dataset.vocab)
    if config.init_from and not resume:
        starting_weights(config, dataset.vocab)


def train(config, folder, resume=False):
    """Train on the prepared data in `folder`, from scratch or from the newest checkpoint in out_dir."""
    rank, world, device = start_workers()
    say = print if rank == 0 else (lambda *_, **__: None)
    dataset, seen = (Dataset(folder, split, rank == 0, config.token_streams) for split in ("train", "seen"))
    found = checkpoints(config.out_dir)
    start = found[-1] if resume and found else config.init_from
    dataset.vocab = seen.vocab = starting_vocab(start, dataset.vocab)
    check(config, dataset, world, resume and found)
    held_out = make_loader(config, seen) if config.eval_every and len(seen) else None
    dtype = compute_dtype(config.dtype, device)
    model = empty_model(config, dataset.vocab, dtype, device)
    prepare_for_speed(model, config, device, say)
    optimizers = make_optimizers(config, model, dtype)
    os.makedirs(config.out_dir, exist_ok=True)
    step, frames, seconds = 0, 0, 0.0
    if resume and found:
        fill(model, checkpoint_weights(found[-1], model))
        load_optimizers(found[-1], optimizers)
        state = read_state(found[-1])
        step, frames, seconds = state["step"], state["frames"], state["seconds"]
        say(f"resuming {found[-1]}")
    elif found:
        raise ValueError(occupied(config.out_dir))
    elif config.init_from:
        fill(model, starting_weights(config, dataset.vocab))
        say(f"weights of {config.init_from}")
    else:
        model.init_weights(torch.Generator(device).manual_seed(config.seed))
    if rank == 0:
        save_config(config, f"{config.out_dir}/config.json")
        for name in ("audio_tokenizer", "text_tokenizer"):      # the run's folder is enough for sample.py
            shutil.copytree(f"{folder}/{name}", f"{config.out_dir}/{name}", dirs_exist_ok=True)
        log = trimmed_log(f"{config.out_dir}/out.jsonl", step)
    params = list(model.parameters())
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters, {world} worker(s) on {device.type}, "
        f"activations {str(dtype)[6:]}, {config.batch_rows} rows of {config.row_frames} frames a step")

    loader, began, paused, first_seconds = make_loader(config, dataset), time.time(), 0.0, seconds
    recent = None
    bar = tqdm(total=config.max_steps, initial=step, unit="step", mininterval=2, disable=rank > 0)
    while step < config.max_steps:
        factor = learning_rate(config, step)
        for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

        rows = range(rank, config.batch_rows, world)            # this worker's share of the global batch
        n = len(rows) // config.grad_accum
        sums, n_frame, n_target = None, 0, 0
        for micro in range(config.grad_accum):
            batch = loader.batch(step, rows[micro * n:(micro + 1) * n])
            loss, part = batch_loss(model, batch, config.softmax)
            loss.backward()
            sums = part if sums is None else [a + b for a, b in zip(sums, part)]
            n_frame += batch.n_frame
            n_target += int((batch.weight[..., 0] > 0).sum())
        *sums, n_frame, n_target = total(sums + [n_frame, n_target])
        recent = sums if recent is None else [a + b for a, b in zip(recent, sums)]  # since the last log line
        sum_gradients(params)
        for p in params:
            p.grad /= n_target              # frames with a stream-0 target, over all workers and micro-steps
        norm = float(torch.nn.utils.clip_grad_norm_(params, config.clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, frames = step + 1, frames + n_frame
        seconds = first_seconds + time.time() - began - paused
        bar.update()

        if step % config.log_every == 0 or step == config.max_steps:
            row = {"step": step, **mean_losses(recent, dataset.vocab.stream_names), "lr": factor * config.lr,
                   "grad_norm": norm, "frames_per_second": frames / seconds, "seconds": seconds}
            recent = None
            shown = [name for name in ("text", "semantic", "acoustic1", "acoustic8") if name in row]
            bar.set_postfix_str(" ".join(f"{name}={row[name]:.2f}" for name in shown))
        else:
            row = None
        pause = time.time()
        if held_out and (step % config.eval_every == 0 or step == config.max_steps):
            losses = held_out_losses(model, held_out, config, rank, world)
            row = (row or {"step": step}) | {"held_out": losses}
        if rank == 0 and row:
            log.write(json.dumps(row) + "\n")
            log.flush()
        if rank == 0 and (step % config.save_every == 0 or step == config.max_steps):
            state = {"frames": frames, "seconds": seconds, "data": os.path.abspath(folder)}
            save_checkpoint(config, dataset.vocab, model, optimizers, step, state)
        paused += time.time() - pause
    bar.close()
    speed = frames / max(seconds, 1e-9)
    say(f"trained {step} steps, {frames / 1e6:.2f}M frames in {seconds:.0f} s: {speed:.0f} frames/s")
    if dist.is_initialized():
        dist.barrier()              # nobody hangs up while another still talks
        dist.destroy_process_group()


def occupied(out_dir):
    return f"{out_dir} holds a run already: add --resume, choose another --out_dir, or delete it"


def trimmed_log(path, step):
    """Open out.jsonl for appending, without the lines of steps that will be done again."""
    kept = []
    if os.path.exists(path):
        with open(path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
    with open(path, "w") as f:
        f.writelines(kept)
    return open(path, "a")


# ---- the whole job: prepare, train, evaluate, each in processes of its own ---------------------------------

def memory_of_family(root):
    """Memory in MB of a process and its descendants now, shared pages counted once (PSS); None off Linux."""
    parents, family, kb = {}, {root}, 0
    try:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat") as f:
                    parents[int(name)] = int(f.read().rpartition(")")[2].split()[1])
            except OSError:         # it has ended meanwhile
                continue
        for pid in sorted(parents):
            ancestor = pid
            while ancestor in parents and ancestor not in family:
                ancestor = parents[ancestor]
            if ancestor in family:
                try:
                    with open(f"/proc/{pid}/smaps_rollup") as f:
                        kb += next(int(line.split()[1]) for line in f if line.startswith("Pss:"))
                except (OSError, StopIteration):
                    continue
    except OSError:
        return None
    return kb / 1024


def run_step(name, command, peak):
    """Run one stage as a process -> its seconds; the most memory seen goes to peak[0]. Exits on failure."""
    began, done = time.time(), threading.Event()

    def watch():
        while not done.wait(1.0):
            peak[0] = max(peak[0], memory_of_family(os.getpid()) or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        code = subprocess.run(command).returncode
    finally:
        done.set()
        watcher.join()
    if code:
        print(f"train.py: {name} failed (exit code {code}); its message is above", file=sys.stderr)
        sys.exit(max(code, 1))
    return time.time() - began


def whole_job(config, arguments, settings, resume):
    """Prepare the data where missing, train with one process per core, evaluate, and say what is where."""
    here, peak, seconds = os.path.dirname(os.path.abspath(__file__)), [0.0], {"prepare": 0.0}
    found = resume and checkpoints(config.out_dir)
    if not found:
        check_start(config)
    folder = prepare.data_folder(config.data_dir, settings)
    if not prepare.is_prepared(folder):
        flags = [f"--{name}={value}" for name, value in settings.items()] + [f"--data_dir={config.data_dir}"]
        seconds["prepare"] = run_step("prepare.py", [sys.executable, f"{here}/prepare.py", *flags], peak)
    workers = config.workers or torch.cuda.device_count() or min(os.cpu_count() or 1, config.batch_rows)
    while workers > 1 and config.batch_rows % (workers * config.grad_accum) and not config.workers:
        workers -= 1
    dataset = Dataset(folder, "train", token_streams=config.token_streams)
    dataset.vocab = starting_vocab(found[-1] if found else config.init_from, dataset.vocab)
    check(config, dataset, workers, found)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={workers}"]
    launch = launch if workers > 1 else [sys.executable]
    seconds["train"] = run_step("training", [*launch, f"{here}/train.py", "--worker", *arguments], peak)
    seconds["eval"] = run_step("eval.py", [sys.executable, f"{here}/eval.py", config.out_dir], peak)

    out = config.out_dir
    with open(f"{out}/results.json") as f:
        results = json.load(f)
    results["peak_memory_mb"], results["seconds"] = peak[0] or None, results["seconds"] | seconds
    measured = {name: results[name] for name in ("seconds", "peak_memory_mb")}      # for later eval.py runs
    for name, content in (("results", results), ("run", measured)):
        prepare.write_file(f"{out}/{name}.json", json.dumps(content, indent=1))
    voices = [Dataset(folder, split).info["audio"] for split in ("unseen", "seen", "train")]
    voice = next(group[0] for group in voices if group)
    print(f"""
prepare {seconds['prepare']:.0f} s, train {seconds['train']:.0f} s, evaluate {seconds['eval']:.0f} s; """
          f"""{results['frames_per_second']:.0f} frames/s, peak memory {peak[0]:.0f} MB
{out}/results.json    the figures above          {out}/curves.png    losses over the run
{out}/wavs            spoken by the model (.model.wav) beside the originals after tokenizing (.original.wav)

try next:
  python sample.py {out} asr {voice}
  python sample.py {out} tts "seven three five" --prompt {voice} --out spoken.wav
  python sample.py {out} continue {voice} --out continued.wav""")


def main(arguments):
    resume, worker = "--resume" in arguments, "--worker" in arguments or "RANK" in os.environ
    config = load_config([a for a in arguments if a not in ("--resume", "--worker")])
    settings = {name: getattr(config, name) for name in prepare.SETTINGS}
    if worker:
        folder = prepare.data_folder(config.data_dir, settings)
        if not prepare.is_prepared(folder):
            raise ValueError(f"{folder}, the data of this configuration, is not there: run prepare.py first")
        train(config, folder, resume)
        if "RANK" in os.environ:    # all is written: leave before the interpreter's teardown, in which gloo's
            sys.stdout.flush()      # threads abort now and then ("terminate called without ...")
            sys.stderr.flush()
            os._exit(0)
    else:
        if checkpoints(config.out_dir) and not resume:
            raise ValueError(occupied(config.out_dir))
        whole_job(config, arguments, settings, resume)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as problem:
        print(f"train.py: {problem}", file=sys.stderr)
        sys.exit(2)
