"""Claim: sharded over workers (FSDP2), in copies or alone, a run is the same run; signals end it in order."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from checkpoint import checkpoints, load_model
from config import load_config
from train import train

ADAMW = ["--batch_rows=4", "--max_steps=20", "--save_every=10", "--eval_every=10", "--log_every=1",
         "--dtype=float32", "--muon_lr=0", "--keep_last=5"]


def launch(n, flags, *options, **popen):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
               *options, ROOT / "train.py", *flags]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, **popen)


def log_of(out):
    return [json.loads(line) for line in open(f"{out}/out.jsonl")]


@pytest.fixture(scope="module")
def alone(tiny_data, tiny_flags, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("alone"))
    train(load_config([*tiny_flags, *ADAMW, f"--out_dir={out}"]), tiny_data)
    return log_of(out)


def test_two_workers_are_one_and_resume_as_one_or_four(alone, tiny_data, tiny_flags, tmp_path):
    """AdamW in fp32: 20 steps on 2 workers have the losses of 1. From the checkpoint of step 10, one worker,
    and four in two copies of two parts each (HSDP), go on with the same losses."""
    two, one, four = (str(tmp_path / name) for name in ("two", "one", "four"))
    job = launch(2, [*tiny_flags, *ADAMW, f"--out_dir={two}"])
    assert job.wait() == 0, job.stdout.read()
    for out in (one, four):
        shutil.copytree(two, out)
        shutil.rmtree(f"{out}/step_0000020")
    train(load_config([*tiny_flags, *ADAMW, f"--out_dir={one}"]), tiny_data, going_on=True)
    job = launch(4, [*tiny_flags, *ADAMW, f"--out_dir={four}", "--shard=2", "--resume"])
    assert job.wait() == 0, job.stdout.read()
    for out in (two, one, four):
        rows = log_of(out)
        assert [row["step"] for row in rows] == list(range(1, 21))
        for ours, theirs in zip(rows, alone):
            for name in ("loss", "text", "semantic", "acoustic1", "acoustic8", "grad_norm"):
                near = pytest.approx(theirs[name], rel=1e-6 if name == "loss" else 1e-5)
                assert ours[name] == near, (out, name)
            if "held_out" in theirs:
                assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
    shards = [name for name in os.listdir(f"{two}/step_0000020") if name.endswith(".safetensors")]
    assert len(shards) == 2 and load_model(two)[0].emb.shape == load_model(four)[0].emb.shape


def test_bfloat16_in_parts_and_recomputed_follows_float32(alone, tiny_flags, tmp_path):
    """The mixed-precision policy, activation checkpointing and accumulation together, as on GPUs."""
    flags = [*tiny_flags, *ADAMW, "--dtype=bfloat16", "--checkpointing=True", "--grad_accum=2",
             "--max_steps=6"]
    job = launch(2, [*flags, f"--out_dir={tmp_path}"])
    assert job.wait() == 0, job.stdout.read()
    for ours, theirs in zip(log_of(tmp_path), alone):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    weights = load_model(str(tmp_path))[0].state_dict().values()
    assert all(weight.dtype == torch.float32 for weight in weights), "master weights stay fp32"


def test_sigterm_saves_and_the_run_goes_on(alone, tiny_data, tiny_flags, tmp_path):
    """SIGTERM to torchrun: the step is finished and saved, nothing more is done; --resume does the rest."""
    flags = [*tiny_flags, *ADAMW, "--max_steps=4000", "--decay=0.5", f"--out_dir={tmp_path}"]
    job = launch(2, flags)
    while not os.path.exists(tmp_path / "out.jsonl") or len(log_of(tmp_path)) < 5:
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    text = job.communicate()[0]
    assert "is saved, go on with --resume" in text and job.returncode != 0, text
    [*_, last] = checkpoints(tmp_path)
    assert log_of(tmp_path)[-1]["step"] == int(last[-7:])


def test_a_killed_worker_is_started_again_by_torchrun(alone, tiny_flags, tmp_path):
    """One of two workers dies; torchrun stops the other and starts both anew, --resume takes the newest."""
    job = launch(2, [*tiny_flags, *ADAMW, f"--out_dir={tmp_path}", "--save_every=1", "--resume"],
                 "--max-restarts=1", env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    while not checkpoints(tmp_path):
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    text = job.communicate()[0]
    assert job.returncode == 0 and "resuming" in text, text
    for ours, theirs in zip(log_of(tmp_path), alone):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert log_of(tmp_path)[-1]["step"] == 20
