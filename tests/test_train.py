"""Claim: the same data give the same model, however split over time, micro-steps and workers; it learns."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_here

import prepare
from checkpoint import load_model
from config import Config, load_config
from data import Dataset
from eval import evaluate
from log import Log
from muon import Muon, orthogonalise
from train import learning_rate, train


def run(tiny_data, tiny_flags, out, *flags, resume=False):
    base = ["--batch_rows=4", "--max_steps=6", "--save_every=3", "--eval_every=0", "--log_every=1",
            "--dtype=float32"]
    train(load_config([*tiny_flags, *base, f"--out_dir={out}", *flags]), tiny_data, resume)
    log = [json.loads(line) for line in open(f"{out}/out.jsonl")]
    return weights_of(out), log


def weights_of(out):
    return load_model(out)[0].state_dict()


def difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def reference(tiny_data, tiny_flags, tmp_path_factory):
    return run(tiny_data, tiny_flags, str(tmp_path_factory.mktemp("reference")))


def test_resumed_is_uninterrupted_bit_for_bit(reference, tiny_data, tiny_flags, tmp_path):
    """A run killed after step 4 leaves the checkpoint of step 3 and a half-written one, which is not read."""
    out = str(tmp_path / "run")
    run(tiny_data, tiny_flags, out)
    import shutil
    shutil.rmtree(f"{out}/step_0000006")
    os.makedirs(f"{out}/step_0000006.tmp")
    weights, log = run(tiny_data, tiny_flags, out, resume=True)
    assert difference(weights, reference[0]) == 0
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6], "the log has no line twice"
    with pytest.raises(ValueError, match="add --resume"):
        run(tiny_data, tiny_flags, out)


def test_four_micro_steps_of_one_row_are_one_of_four(reference, tiny_data, tiny_flags, tmp_path):
    weights, log = run(tiny_data, tiny_flags, str(tmp_path), "--grad_accum=4")
    assert difference(weights, reference[0]) < 1e-4
    for row, other in zip(log, reference[1]):
        assert row["semantic"] == pytest.approx(other["semantic"], rel=1e-5)


def test_new_rows_can_learn_faster_than_the_text(tiny_data, tiny_flags, tmp_path):
    """What is not text moves five times as far in a step of AdamW, and the rest as it always does."""
    flags = ["--muon_lr=0", "--lr=1e-3", "--warmup=0", "--max_steps=1", "--save_every=1"]
    still, *moved = (run(tiny_data, tiny_flags, str(tmp_path / name), *flags, *more)[0] for name, more in (
        ("still", ["--lr=0"]), ("as ever", []), ("fast", ["--new_rows=5"])))
    text = Dataset(tiny_data, "train").vocab.text_start
    plain, fast = ({name: weights[name] - still[name] for name in still} for weights in moved)
    for name in still:
        if name in ("emb", "lm_head"):
            torch.testing.assert_close(fast[name][:text], 5 * plain[name][:text], rtol=1e-3, atol=1e-6)
            assert torch.equal(fast[name][text:], plain[name][text:]) and plain[name][:text].any()
        else:
            assert torch.equal(fast[name], plain[name])


def test_two_workers_are_one(reference, tiny_flags, tmp_path):
    """The same through torchrun and gloo: each worker takes half of the rows."""
    flags = [*tiny_flags, "--batch_rows=4", "--max_steps=6", "--save_every=6", "--eval_every=3",
             "--log_every=1", "--dtype=float32", f"--out_dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    ROOT / "train.py", *flags], check=True, capture_output=True)
    log = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert difference(weights_of(str(tmp_path)), reference[0]) < 1e-4
    for row, other in zip(log, reference[1]):
        assert row["semantic"] == pytest.approx(other["semantic"], rel=1e-5)
    found = log[2]["held_out"]
    assert {"asr text", "tts semantic", "tts acoustic8"} <= set(found), "each task is measured by itself"


@pytest.mark.parametrize("half, streams", [("semantic", 1), ("acoustic", 8)])
def test_half_of_the_tokens_trains_and_evaluates(half, streams, tiny_data, tiny_flags, tmp_path):
    """The ablations need no data of their own; semantic tokens alone have no sound, and are not asked."""
    flags = f"--token_streams={half} --max_steps=2 --tts_utterances=2 --max_speech_s=0.5".split()
    run(tiny_data, tiny_flags, str(tmp_path), *flags)
    results = evaluate(str(tmp_path))
    assert load_model(str(tmp_path))[2].n_stream == streams
    assert results["tts"]["own_asr"]["n"] == (0 if half == "semantic" else 2)
    names = {name.split()[1] for name in results["perplexity"]["seen"]} - {"text", "special"}
    assert names == ({"semantic"} if half == "semantic" else {f"acoustic{k}" for k in range(1, 9)})


def test_a_task_that_held_out_data_lack_is_not_measured(tiny_data, tiny_flags, tmp_path):
    """Speech without transcripts beside text that nobody spoke: both are learned, speech alone is held out;
    nobody asks a model to read or to speak that never learned it."""
    rows = [("id", "audio", "text", "speaker", "split"),
            ("words", "-", "seven three / five and/or two", "-", "train")]
    for split in ("train", "unseen"):
        rows += [(f"{split}{k}", path, "-", "me", split)
                 for k, path in enumerate(Dataset(tiny_data, split).info["audio"][:8])]
    manifest = tmp_path / "speech.tsv"
    manifest.write_text("\n".join("\t".join(row) for row in rows))
    settings = prepare.SETTINGS | {"corpus": str(manifest), "audio_tokenizer": f"{tiny_data}/audio_tokenizer"}
    folder, out = prepare.prepare(settings, str(tmp_path), n_process=1), str(tmp_path / "out")
    train(load_config([*tiny_flags, f"--out_dir={out}", "--mixture={'speech': 1, 'text': 1}", "--max_steps=2",
                       "--eval_every=2"]), folder)
    held_out = json.loads(open(f"{out}/out.jsonl").readlines()[-1])["held_out"]
    assert "speech semantic" in held_out and not any(name.startswith("text") for name in held_out)
    found = evaluate(out)
    assert {kind.split()[0] for kind in found["perplexity"]["unseen"]} == {"speech"}
    assert "speech semantic" in found["perplexity"]["unseen"] and found["asr"]["unseen"]["n"] == 0


def test_bfloat16_follows_float32(reference, tiny_data, tiny_flags, tmp_path):
    weights, log = run(tiny_data, tiny_flags, str(tmp_path), "--dtype=bfloat16")
    assert all(w.dtype == torch.float32 for w in weights.values()), "master weights stay fp32"
    for row, other in zip(log, reference[1]):
        assert row["semantic"] == pytest.approx(other["semantic"], rel=0.03)


def test_a_tracker_gets_the_lines_of_the_log(tiny_data, tiny_flags, tmp_path, monkeypatch):
    """wandb and trackio have the same three functions; here a module of ours stands for them."""
    (tmp_path / "trackio.py").write_text("rows = []\ndef init(**about): rows.append(about)\n"
                                         "def log(row, step): rows.append(row)\n"
                                         "def finish(): rows.append('end')\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, log = run(tiny_data, tiny_flags, str(tmp_path / "run"), "--track=trackio", "--max_steps=2")
    import trackio
    assert trackio.rows[0]["config"]["max_steps"] == 2 and trackio.rows[1:] == [*log, "end"]
    assert {"loss", "lr", "grad_norm", "mfu", "memory_mb", "eta_s", "frames_per_second"} <= set(log[0])
    with pytest.raises(ValueError, match="is not installed"):
        run(tiny_data, tiny_flags, str(tmp_path / "other"), "--track=no_such_tracker")


def test_the_schedule_warms_up_holds_and_ends_near_zero():
    config = load_config(["--max_steps=100", "--warmup=0.1", "--decay=0.5"])
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and rates[49] == 1
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_muon_steps_along_the_nearest_orthogonal_matrix():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 10, generator=g)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    ours = orthogonalise(x, 5)
    assert torch.nn.functional.cosine_similarity(ours.flatten(), (u @ v).flatten(), dim=0) > 0.95
    torch.testing.assert_close(orthogonalise(x.mT, 5), orthogonalise(x, 5).mT)
    p = torch.nn.Parameter(torch.randn(10, 6, generator=g))
    before, p.grad = p.detach().clone(), torch.randn(10, 6, generator=g)
    Muon([p], lr=0.1).step()
    step = -0.1 * (10 / 6) ** 0.5 * orthogonalise(p.grad[None], 5)[0]
    torch.testing.assert_close(p.detach() - before, step)


def test_wrong_checkpoints_and_worker_numbers_are_explained(reference, tiny_data, tiny_flags, tmp_path):
    with pytest.raises(ValueError, match="can't be shared"):
        run(tiny_data, tiny_flags, str(tmp_path), "--grad_accum=3")
    out = str(tmp_path / "a")
    run(tiny_data, tiny_flags, out, "--max_steps=1")
    with pytest.raises(ValueError, match="another model"):
        run(tiny_data, tiny_flags, out, "--d_ff=96", resume=True)
    for flag, message in (("--n_head=3", "multiple of 2 x n_head"), ("--softmax=all", "'grammar' or"),
                          ("--dtype=float8", "auto, float32"), ("--mixture={'sing': 1}", "unknown task")):
        with pytest.raises(ValueError, match=message):
            run(tiny_data, tiny_flags, str(tmp_path / "b"), flag)
    with pytest.raises(ValueError, match="no checkpoint"):
        load_model(str(tmp_path))


def test_the_main_command_in_small(tmp_path, tiny_data, tiny_flags):
    """20 steps of the whole job: data, two workers, evaluation, and every file that the README promises."""
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/numbers.py"), *tiny_flags,
               "--max_steps=20", f"--out_dir={out}", "--tts_utterances=4", "--max_speech_s=1.0",
               "--log_every=5"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    results = json.load(open(out / "results.json"))
    assert set(results) >= {"asr", "tts", "seconds", "frames_per_second", "peak_memory_mb", "parameters"}
    assert results["asr"]["seen"]["n"] == results["asr"]["unseen"]["n"] == 6
    assert results["tts"]["own_asr"]["n"] == 4
    assert set(results["seconds"]) == {"prepare", "train", "eval"} and results["tts"]["whisper"] is None
    assert len(list((out / "wavs").glob("*.wav"))) == 8 and (out / "curves.png").stat().st_size > 5000
    assert "try next:" in result.stdout
    rows = [json.loads(line) for line in open(out / "out.jsonl")]
    losses = [row["semantic"] for row in rows if "semantic" in row]
    assert losses[-1] < 3.3 < losses[0], losses
    for flag, message in (("--max_steps=20", "add --resume"), (f"--out_dir={out}2", "unknown task 'sing'")):
        code, _, complaint = run_here(*command[1:], flag, "--mixture={'sing': 1}")
        assert code == 2 and message in complaint


def test_a_model_keeps_its_delay(tiny_data, tiny_flags, tmp_path):
    """What learned without a delay is read without one, and not trained on with one."""
    out = str(tmp_path / "run")
    run(tiny_data, tiny_flags, out, "--delay=0", "--max_steps=1")
    _, config, vocab, _ = load_model(out)
    assert config.delay == vocab.delay == 0
    with pytest.raises(ValueError, match="delay=1, but .* learned with 0"):
        run(tiny_data, tiny_flags, str(tmp_path / "other"), f"--init_from={out}")
    with pytest.raises(ValueError, match="1, or 0 for none"):
        run(tiny_data, tiny_flags, str(tmp_path / "third"), "--delay=2")


def test_a_jump_of_the_loss_is_told_from_the_ups_and_downs_of_a_mixture(tmp_path, capsys):
    state = {"step": 0, "frames": 0, "seconds": 0.0, "skipped": 0}
    log = Log(Config(out_dir=str(tmp_path)), [], state, 1.0, torch.device("cpu"), 0)
    for step, loss in enumerate([1.0, 1.0, 1.0, 1.0, 2.5] * 20 + [9.0], 1):
        log.step(state | {"step": step}, [], loss, 1.0, 1e-3, 0.0, False)
    log.close()
    jumps = [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]
    assert len(jumps) == 1 and jumps[0].startswith("step 101: the loss jumped to 9.000")
