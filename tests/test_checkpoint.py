"""Claim: whatever ends a run, no finished checkpoint is lost, no broken one is read, and the run goes on."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train as trainer
from checkpoint import checkpoints, load_model
from config import load_config
from train import train

BASE = ["--batch_rows=4", "--save_every=2", "--eval_every=0", "--log_every=1", "--dtype=float32", "--shard=1"]


def steps_of(out):
    return [json.loads(line)["step"] for line in open(f"{out}/out.jsonl")]


def start(flags, n=1, **popen):
    launch = [] if n == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command = [sys.executable, *launch, str(ROOT / "train.py"), "--worker", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **popen)


def finish(flags, n, data):
    """Train to the end: one worker in this process, which has one thread too."""
    if n == 1:
        train(load_config([flag for flag in flags if flag != "--resume"]), data, "--resume" in flags)
    else:
        job = start(flags, n)
        text = job.communicate()[0]
        assert job.returncode == 0, text


def family(pid):
    """A process and its descendants."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid] + [member for child in children for member in family(int(child))]


@pytest.mark.parametrize("kills, n, n_step", [(3, 1, 60), pytest.param(20, 2, 400, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_with_the_same_weights(kills, n, n_step, tiny_data, tiny_flags,
                                                              tmp_path):
    """kill -9 at random moments, every other time in the middle of saving; bit for bit the same."""
    flags, chance = [*tiny_flags, *BASE, f"--max_steps={n_step}", f"--shard={n % 2}"], random.Random(0)
    whole, out = str(tmp_path / "whole"), str(tmp_path / "killed")
    finish([*flags, f"--out_dir={whole}"], n, tiny_data)
    reached = []
    for kill in range(kills):
        job = start([*flags, f"--out_dir={out}", "--resume"], n)
        goal = len(checkpoints(out)) and int(checkpoints(out)[-1][-7:])
        goal += chance.randrange(2, 2 * n_step // kills)
        while job.poll() is None:
            names = os.listdir(out) if os.path.isdir(out) else []
            steps = [name for name in names if name.startswith("step_")]
            saving = any(name.endswith(".tmp") for name in steps)
            if max([int(name[5:12]) for name in steps], default=0) >= goal and (saving or kill % 2):
                break
            time.sleep(0.001)
        if job.poll() is None:
            time.sleep(chance.random() * 0.02)
            for pid in family(job.pid):
                os.kill(pid, signal.SIGKILL)
        job.communicate()
        reached += checkpoints(out)[-1:]
    finish([*flags, f"--out_dir={out}", "--resume"], n, tiny_data)
    assert len(set(reached)) > 1, reached
    (killed, *_), (uninterrupted, *_) = load_model(out), load_model(whole)
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(killed.state_dict()[name], weight), name
    assert steps_of(out) == list(range(1, n_step + 1)), "the log has no line twice"


@pytest.fixture(scope="module")
def run(tiny_data, tiny_flags, tmp_path_factory):
    """Six steps, checkpoints of the steps 4 and 6."""
    out = str(tmp_path_factory.mktemp("run"))
    train(load_config([*tiny_flags, *BASE, "--max_steps=6", f"--out_dir={out}"]), tiny_data)
    return out


def shard(folder):
    [name] = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return f"{folder}/{name}"


def flip(path):
    with open(path, "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        byte = f.read(1)[0]
        f.seek(-1000, os.SEEK_END)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harm, message", [
    (flip, "is not what was written"), (os.remove, "No such file"),
    (lambda path: os.truncate(path, os.path.getsize(path) // 2), "bytes, not")])
def test_a_damaged_checkpoint_is_never_read(harm, message, run, tiny_data, tiny_flags, tmp_path, capsys):
    """A flipped byte, a file cut short or lost: sample.py refuses, --resume takes the checkpoint before."""
    out = str(tmp_path / "run")
    shutil.copytree(run, out)
    os.makedirs(f"{out}/step_0000008.tmp")
    harm(shard(f"{out}/step_0000006"))
    with pytest.raises(ValueError, match="is damaged"):
        load_model(out)
    train(load_config([*tiny_flags, *BASE, "--max_steps=6", f"--out_dir={out}"]), tiny_data, going_on=True)
    told = capsys.readouterr().out
    assert message in told and "step_0000008.tmp: its writing was cut off" in told
    assert f"resuming {out}/step_0000004" in told and sorted(os.listdir(out)) == sorted(os.listdir(run))
    for name, weight in load_model(run)[0].state_dict().items():
        assert torch.equal(load_model(out)[0].state_dict()[name], weight), name


def test_what_cannot_be_written_is_an_error_and_nothing_is_lost(run, tiny_data, tiny_flags, tmp_path):
    """A full disk, played by a limit on the size of files: the last good checkpoint stays, and we go on."""
    out = str(tmp_path / "run")
    shutil.copytree(run, out)
    size = os.path.getsize(shard(checkpoints(out)[-1])) * 9 // 10
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    flags = [*tiny_flags, *BASE, "--max_steps=12", f"--out_dir={out}", "--resume"]
    job = start(flags, preexec_fn=limit)
    text = job.communicate()[0]
    assert job.returncode == 2 and "could not be written" in text and "Traceback" not in text, text
    assert "step_0000006 is whole" in text and checkpoints(out)[-1].endswith("step_0000006"), text
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    train(load_config(flags[:-1]), tiny_data, going_on=True)
    assert checkpoints(out)[-1].endswith("step_0000012")


def test_kept_are_the_last_and_every_so_many(run, tiny_data, tiny_flags, tmp_path):
    train(load_config([*tiny_flags, *BASE, "--max_steps=12", "--keep_last=1", "--keep_every=4",
                       "--save_every=1", f"--out_dir={tmp_path}"]), tiny_data)
    assert [int(path[-7:]) for path in checkpoints(tmp_path)] == [4, 8, 12]


def test_a_step_that_is_not_finite_is_skipped(run, tiny_data, tiny_flags, tmp_path, monkeypatch, capsys):
    """One such step leaves weights and moments as they are; three in a row end the run and say where."""
    def poisoned(bad_calls):
        calls = iter(range(1, 100))
        def loss(model, *arguments):    # head_emb alone gets a gradient that is none
            loss, report = right(model, *arguments)
            bad = model.head_emb.sum() * float("nan")
            return (loss + bad if next(calls) in bad_calls else loss), report
        return loss

    right, flags = trainer.batch_loss, [*tiny_flags, *BASE, "--max_steps=6", "--max_bad_steps=3"]
    monkeypatch.setattr(trainer, "batch_loss", poisoned({3}))
    train(load_config([*flags, f"--out_dir={tmp_path}/one"]), tiny_data)
    log = [json.loads(line) for line in open(tmp_path / "one/out.jsonl")]
    assert [row["skipped"] for row in log] == [0, 0, 1, 1, 1, 1] and log[2]["loss"] is None
    assert "step 3: loss nan" in capsys.readouterr().out
    assert all(w.isfinite().all() for w in load_model(f"{tmp_path}/one")[0].state_dict().values())
    monkeypatch.setattr(trainer, "batch_loss", poisoned({3, 4, 5}))
    with pytest.raises(ValueError, match="3 steps in a row"):
        train(load_config([*flags, f"--out_dir={tmp_path}/three"]), tiny_data)
    told = json.load(open(tmp_path / "three/nonfinite.json"))
    assert told["step"] == 5 and told["gradients"] == ["head_emb"] and len(told["documents"]) > 3
    assert checkpoints(tmp_path / "three")[-1].endswith("step_0000004")


def test_settings_that_changed_are_named(run, tiny_data, tiny_flags, tmp_path, capsys):
    out = str(tmp_path / "run")
    shutil.copytree(run, out)
    flags = [*tiny_flags, *BASE, "--max_steps=7", "--lr=0.001", f"--out_dir={out}"]
    train(load_config(flags), tiny_data, going_on=True)
    told = capsys.readouterr().out
    assert "with other settings" in told and "lr was 0.003, is 0.001" in told and "max_steps was 6" in told
    with pytest.raises(ValueError, match="another model"):
        train(load_config([*flags, "--d_ff=96"]), tiny_data, going_on=True)
