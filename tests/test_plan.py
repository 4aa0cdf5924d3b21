"""Claim: the plan of a run, made without memory, says what the run then takes."""
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT

from config import load_config
from interleave import Vocab
from plan import plan_memory


def plan(*arguments):
    command = [sys.executable, str(ROOT / "plan.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_planned_memory_is_measured_memory_within_a_tenth():
    """The second step of a real run in one process; without a GPU the only one that we can make."""
    code, text = plan(str(ROOT / "configs/numbers.py"), "--measure", "--d_model=384", "--d_ff=1024",
                      "--n_head=6", "--n_layer=3", "--row_frames=3072", "--batch_rows=1", "--n_text=10000")
    assert code == 0, text
    assert abs(float(text.split("the plan is")[1].split("%")[0])) < 10, text


def test_more_gpus_hold_less_each_and_recomputing_less_still():
    config, vocab = load_config(["--n_layer=2", "--row_frames=1024"]), Vocab(500, 64, 8, 3000)
    few, many = (plan_memory(config, vocab, gpus, 1024)["Total"] for gpus in (2, 8))
    again = plan_memory(replace(config, checkpointing=True), vocab, 8, 1024)["Total"]
    assert few > many > again
    code, text = plan(str(ROOT / "configs/135m.py"), "--gpus=5")
    assert code == 2 and "can't be shared" in text and "Traceback" not in text
    for scope in ("grammar", "original"):       # a model without acoustic streams
        alone = Vocab(500, 0, 0, 3000)
        assert plan_memory(replace(config, softmax=scope), alone, 2, 512)["Total"] > 0


@pytest.mark.slow
def test_7b_on_eight_gpus_needs_less_than_20_gib():
    code, text = plan(str(ROOT / "configs/7b.py"), "--gpus=8")
    assert code == 0 and float(text.split("Total")[1].split("GiB")[0]) < 20, text
