"""Claim: annealing goes on from where a run was, down to a rate of zero; data are mixed and joined."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run_here

from anneal import annealing_settings
from checkpoint import load_model
from config import Config, load_config
from data import Dataset, Loader
from interleave import speech_frames
from tokenize_text import TextTokenizer


@pytest.fixture(scope="module")
def half_way(tiny_data, tiny_flags, tmp_path_factory):
    """A run of 8 steps whose last 4 are its decay; the checkpoints of steps 4, 6 and 8 stay."""
    from train import train
    out = str(tmp_path_factory.mktemp("run"))
    train(load_config([*tiny_flags, f"--out_dir={out}", "--max_steps=8", "--save_every=2", "--keep_every=2"]),
          tiny_data)
    return out


def test_it_begins_with_the_rate_that_the_run_had(half_way, tmp_path):
    whole, decaying = (annealing_settings([f"--init_from={half_way}/step_000000{n}", "--max_steps=5"])
                       for n in (4, 6))
    assert whole["lr"] == pytest.approx(3e-3) and decaying["lr"] == pytest.approx(1.5e-3)
    assert decaying["muon_lr"] == pytest.approx(0.01) and decaying["max_steps"] == 5
    assert decaying["d_model"] == load_model(half_way)[1].d_model, "the model is the run's"
    mixed = shutil.copytree(f"{half_way}/step_0000004", tmp_path / "mixed")
    about = json.loads((mixed / "config.json").read_text()) | {"datasets": {"data/a": 0.6, "data/b": 0.4}}
    (mixed / "config.json").write_text(json.dumps(about))
    before = annealing_settings([f"--init_from={mixed}"])
    assert before["datasets"] == about["datasets"] and not before["data"], "on what the run had, all of it"
    assert not annealing_settings([f"--init_from={mixed}", "--data=data/c"])["datasets"]
    with pytest.raises(ValueError, match="come down to zero already"):
        annealing_settings([f"--init_from={half_way}"])
    assert not annealing_settings([f"--init_from={half_way}", "--lr=1e-4"])["moments"]
    with pytest.raises(ValueError, match="where from"):
        annealing_settings(["--max_steps=3"])


def test_the_rate_falls_in_a_line_to_zero_and_the_moments_are_the_runs(half_way, tmp_path):
    weights = {}
    for moments in (True, False):
        out = f"{tmp_path}/{moments}"
        flags = [f"--init_from={half_way}/step_0000004", "--max_steps=4", f"--out_dir={out}", "--log_every=1"]
        code, _, err = run_here(ROOT / "anneal.py", *flags, f"--moments={moments}", "--worker")
        assert code == 0, err
        rates = [json.loads(line)["lr"] for line in open(f"{out}/out.jsonl")]
        assert rates == pytest.approx([3e-3 * left / 4 for left in (4, 3, 2, 1)])
        weights[moments] = load_model(out)[0].emb
    assert not weights[True].equal(weights[False]), "without them it would begin as if nothing had been"


def test_utterances_that_follow_each_other_are_joined(tiny_data):
    """Speech and text of a splice are those of its members, in order; it never grows over its budget."""
    dataset = Dataset(tiny_data, "train")
    dataset.index[:, 4] = np.arange(len(dataset)) // 7          # speakers with seven utterances each
    dataset.by_speaker, dataset.speakers = np.arange(len(dataset)), dataset.index[:, 4]
    tokenizer = TextTokenizer.load(f"{tiny_data}/text_tokenizer")
    loader = Loader(dataset, Config(mixture={"asr": 1, "tts": 1}, prompt_len=20, splice_frames=250))
    assert 7 > loader.joinable.max() > 2 and loader.joinable.min() == 1
    i = int(loader.joinable.argmax())
    members = loader.members("asr", i, int(loader.joinable[i]) - 1)
    assert members == list(range(i, i + int(loader.joinable[i])))
    assert sum(len(dataset[k][0]) for k in members) <= 250
    assert len({dataset[k][2] for k in members}) == 1, "one speaker"
    tokens = loader.document("asr", members, 0)[0]
    assert len(tokens) - 1 == loader.length("asr", members)
    speech = speech_frames(dataset.vocab, np.concatenate([dataset[k][0] for k in members]))
    assert (tokens[3:3 + len(speech)] == speech).all()
    ids = tokens[(tokens[:, 0] >= dataset.vocab.text_start), 0] - dataset.vocab.text_start
    assert tokenizer.decode(ids) == " ".join(dataset.info["text"][k] for k in members)
    inside = {dataset[k][0][s:s + 20].tobytes() for k in members for s in range(len(dataset[k][0]))}
    prompts = [dataset.draw_prompt(i, 20, np.random.default_rng(s), members) for s in range(9)]
    assert not any(prompt.tobytes() in inside for prompt in prompts), "the voice prompt is from elsewhere"


def test_a_curriculum_comes_first_and_one_folder_at_a_time(tiny_data, tiny_flags, tmp_path):
    """Short pieces for the first fifth of the steps, longer ones for the next two, then the data; a lesson's
    pieces stay as short as they are where others are recombined."""
    import train
    short, longer = str(tmp_path / "short"), str(tmp_path / "longer")
    for folder in (short, longer):
        shutil.copytree(tiny_data, folder)
    flags = [flag for flag in tiny_flags if not flag.startswith(("--data", "--max_steps"))]
    config = load_config([*flags, f"--data={tiny_data}", "--max_steps=10",
                          "--curriculum=" + str({short: 0.2, longer: 0.4}), "--recombine_frames=300"])
    dataset = train.open_data(config, tiny_data)
    loader = Loader(dataset, config)
    plans = [[members for row in loader.plan(step) for _, members, _ in row] for step in range(10)]
    assert [{int(dataset.source[members[0]]) for members in plan} for plan in plans] \
        == [{1}] * 2 + [{2}] * 4 + [{0}] * 4
    assert [max(map(len, plan)) > 1 for plan in plans] == [False] * 6 + [True] * 4
    with pytest.raises(ValueError, match="a start from a text LLM"):
        train.check(replace(config, rows_from_text=True), dataset, 1)
    config.curriculum[longer] = 0.9
    with pytest.raises(ValueError, match="1 in all at most"):
        train.check(config, dataset, 1)


def test_folders_are_drawn_by_their_weights_and_must_share_tokenizers(tiny_data, tmp_path):
    other, foreign = str(tmp_path / "other"), str(tmp_path / "foreign")
    shutil.copytree(tiny_data, other)
    dataset = Dataset(tiny_data, "train", others=[other])
    assert len(dataset) == 300 and dataset.info["id"][0] == dataset.info["id"][150]
    assert not set(dataset.index[:150, 4]) & set(dataset.index[150:, 4]), "speakers of two folders are others"
    loader = Loader(dataset, Config(mixture={"asr": 1, "text": 1}, datasets={tiny_data: 3.0, other: 1.0}))
    drawn = [dataset.source[i] for step in range(40) for row in loader.plan(step) for _, (i,), _ in row]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.04)
    shutil.copytree(tiny_data, foreign)
    with open(f"{foreign}/audio_tokenizer/codebooks.safetensors", "ab") as f:
        f.write(b"x")
    with pytest.raises(ValueError, match="different tokenizers"):
        Dataset(tiny_data, "train", others=[foreign])
