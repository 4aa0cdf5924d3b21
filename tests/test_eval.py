"""Claim: error rates are counted as the field counts them, and Whisper's spelling decides no verdict."""
import json
import os
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, run_here

from data import Dataset
from eval import evaluate, note_error_rates, pick_utterances
from plot import read_run
from results import compare, file_ending, keep_results
from wer import (
    capped_rate,
    comparable,
    edit_counts,
    edit_distance,
    error_report,
    interval,
    rated,
    spell_out,
    word_error_rate,
)


def test_word_error_rate_agrees_with_jiwer():
    """Pair by pair, a thousand of them, and all of them as one: words, letters, and the kinds of errors."""
    jiwer = pytest.importorskip("jiwer")
    rng = random.Random(0)
    texts = [[" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(1000)] for _ in range(2)]
    for pair in zip(*texts):
        assert word_error_rate(*[[text] for text in pair]) == pytest.approx(100 * jiwer.wer(*pair))
    report, theirs = error_report(*texts), jiwer.process_words(*texts)
    assert report["wer"] == pytest.approx(100 * theirs.wer)
    assert report["cer"] == pytest.approx(100 * jiwer.cer(*texts))
    errors = sum(report[name] for name in ("substitutions", "insertions", "deletions"))
    assert errors == theirs.substitutions + theirs.insertions + theirs.deletions
    assert edit_distance("a b c".split(), "a x c d".split()) == 2 and word_error_rate(["a b"], [""]) == 100


def test_errors_are_told_apart_and_have_an_interval():
    assert edit_counts("a b c d".split(), "a x d e".split()) == (1, 1, 1)
    rng = random.Random(1)
    texts = [[" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(80)] for _ in range(2)]
    for r, h in zip(*texts):
        assert sum(edit_counts(r.split(), h.split())) == edit_distance(r.split(), h.split())
    report = error_report(*texts)
    low, high = report["wer_interval"]
    assert report["wer"] == pytest.approx(word_error_rate(*texts)) and low < report["wer"] < high
    assert report["substitutions"] + report["insertions"] + report["deletions"] == round(
        report["wer"] / 100 * report["words"])
    mean, low, high = interval([0, 1] * 200)        # a coin: 0.5, give or take 1.96 * 0.5 / sqrt(400)
    assert mean == 0.5 and low == pytest.approx(0.451, abs=0.012) and high == pytest.approx(0.549, abs=0.012)
    assert interval([6, 0, 0], [2, 0, 0]) == (3, 3, 3), "draws that count nothing do not pull it to 0"


def test_two_runs_are_compared_utterance_by_utterance(tmp_path):
    """With whatever both have measured of the same: error rates, and anything else with a value of each."""
    texts, run = [f"one two three {k}" for k in range(60)], {}
    for name, wrong in (("a", 20), ("b", 21), ("c", 55)):
        heard = [text.replace("two", "new") if k < wrong else text for k, text in enumerate(texts)]
        run[name] = str(tmp_path / name)
        os.makedirs(run[name])
        likeness = [[text, 0.5 + wrong / 100 + k % 7 / 10, 1] for k, text in enumerate(texts)]
        keep_results(run[name], "", {}, {"ASR WER": rated(texts, heard), "likeness": likeness}, anew=True)
        keep_results(run[name], "", {"later": 1}, {name: [[0, 1, 1]], "rows": [[name, 1, 1]]})
    near, alike, *rest = compare(run["a"], run["b"]).splitlines()
    far = compare(run["a"], run["c"]).splitlines()[0]
    assert "8.33 and 8.75, difference +0.42" in near and "within chance" in near
    assert "difference +15" in far and "clear" in far and "n=60" in far
    assert "difference +0.01 (+0.01 to +0.01), clear" in alike, "whoever is drawn, both are"
    assert rest == ["a: only of " + run["a"], "rows: not of the same in both", "b: only of " + run["b"]]
    with pytest.raises(ValueError, match="not evaluated so yet: .* --beam=4"):
        compare(run["a"], run["b"], beam=4)


def test_other_ways_have_files_of_their_own(tiny_run, tmp_path):
    """So a beam, a small test or an earlier checkpoint overwrites neither what the run gave nor its curve."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    content = lambda: {name: (run / name).read_text() for name in ("results.json", "items.json", "wer.jsonl")
                       if os.path.exists(run / name)}
    before = content()
    found = evaluate(str(run), n=2, beam=2)
    with open(f"{run}/results_n2_beam2.json") as f:
        assert json.load(f)["asr"]["unseen"]["wer"] == found["asr"]["unseen"]["wer"]
    assert found["asr"]["unseen"]["n"] == 2 and os.path.exists(f"{run}/transcripts_n2_beam2.json")
    assert not found["perplexity"] and not found["tts"]["own_asr"]["n"], "which a beam does not touch"
    [checkpoint] = (path for path in run.iterdir() if path.name.startswith("step_"))
    evaluate(str(checkpoint), n=1)
    assert os.path.exists(f"{run}/results_{checkpoint.name}_n1.json") and content() == before
    assert file_ending("", "data/mine/", guidance=1.5, quant="int8") == "_mine_int8_guidance1.5"
    assert file_ending() == "" == file_ending(n=None, join=1, beam=1, guidance=None, quant="", data=None)


def test_utterances_of_a_speaker_are_tested_as_one_long_one():
    """Two speakers take turns, the third has a single utterance, which no other goes with; text alone and
    speech alone are no test of either."""
    speakers = np.array([0, 1, 0, 1, 2, 0, 1, 0])
    index = np.ones((10, 5), int)
    index[:, 4], index[8, 1], index[9, 3] = [*speakers, 0, 0], 0, 0
    dataset = SimpleNamespace(index=index, paired=lambda: Dataset.paired(dataset))
    assert pick_utterances(dataset, 9, 2) == [[0, 2], [1, 3], [5, 7]]
    assert pick_utterances(dataset, 2, 3) == [[0, 2, 5], [1, 3, 6]] and not pick_utterances(dataset, 9, 5)
    assert pick_utterances(dataset, 99) == [[k] for k in range(8)] and pick_utterances(dataset, 0) == []
    some = pick_utterances(dataset, 3)
    assert len(some) == 3 and some == pick_utterances(dataset, 3) and some == sorted(some)
    assert some != [[0], [1], [2]], "corpora come speaker by speaker"
    with pytest.raises(ValueError, match="one utterance is the least"):
        pick_utterances(dataset, 9, 0)


def test_the_cap_keeps_one_endless_answer_from_standing_for_all():
    references, hypotheses = ["one two", "three four"], ["one two", "four " * 200]
    assert word_error_rate(references, hypotheses) > 1000
    found = capped_rate("wer", references, hypotheses)
    assert found["wer"] == 50 and found["wer_interval"] == [0, 100]


@pytest.mark.parametrize("heard, reference, words", [
    ("735.", "seven three five", "seven three five"), ("7-3-5", "seven three five", "seven three five"),
    ("2,345", "two thousand three hundred and forty five", "two thousand three hundred and forty five"),
    ("206!", "two hundred and six", "two hundred and six"), ("Twenty-six", "twenty six", "twenty six"),
    ("123456", "nine hundred", "one two three four five six")])
def test_numerals_are_spelled_out_as_the_reference_is(heard, reference, words):
    assert spell_out(heard, reference) == words
    assert comparable(reference, heard) == (reference, words)


def test_other_texts_are_compared_in_whispers_own_spelling():
    pytest.importorskip("whisper_normalizer")
    assert len(set(comparable("mister smith doesn't pay twenty dollars", "Mr. Smith does not pay $20."))) == 1


def test_a_judge_that_is_absent_leaves_a_row_that_says_how_to_get_it(tiny_run, tmp_path, monkeypatch):
    """The rest of the one table stands, and the exit code tells scripts."""
    for package in ("faster_whisper", "resemblyzer"):
        monkeypatch.setitem(sys.modules, package, None)
    page = tmp_path / "page.txt"
    page.write_text("seven three five")
    mmlu = tmp_path / "mmlu.jsonl"
    mmlu.write_text(json.dumps({"question": "?", "choices": ["one", "two"], "gold": 0, "subject": "law"}))
    code, out, err = run_here(ROOT / "eval.py", tiny_run, "--n=2", "--whisper=whisper-base", "--voice",
                              "--text", page, "--choices", tmp_path / "none.jsonl", "--choices", mmlu,
                              "--shots", tmp_path / "shots.jsonl", "--before", tmp_path / "nowhere")
    assert code == 3, err
    assert "TTS WER by Whisper: not available" in out and "pip install -e '.[eval]'" in out
    assert "ASR WER" in out and "(n=2)" in out and "nats a word" in out
    assert "similarity: not available: pip install" in out and "letters a second" in out
    assert "none.jsonl: not available: no such file" in out and "bits a byte" in out
    assert "mmlu.jsonl: not available: it is asked after examples" in out
    assert "nowhere: not available:" in out and "no such folder" in out


def test_curves_show_error_rates_by_step_and_compare_runs(tiny_run, tmp_path):
    """wer.jsonl keeps one line for each checkpoint that was evaluated, in the order of steps."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for step, wer in ((9, 12.0), (3, 80.0), (9, 11.0)):
        results = {"asr": {"seen": {"wer": None}, "unseen": {"wer": wer}}, "tts": {"own_asr": {"wer": 99.0}}}
        note_error_rates(run, {"step": step, "frames": 100 * step}, results)
    rows, wers = read_run(run)
    assert [(row["step"], row["asr_unseen"]) for row in wers] == [(3, 80.0), (9, 11.0)]
    assert rows[-1]["frames"] > 0 and os.path.getsize(run / "curves.png") > 5000, "training left curves"
    with open(run / "out.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    assert read_run(run)[0] == rows, "a line that a kill cut off is no obstacle"
    code, out, err = run_here(ROOT / "eval.py", str(run), "--plot", tiny_run)
    assert code == 0 and os.path.getsize(run / "compare.png") > 5000, err
    kept = shutil.copy(run / "out.jsonl", tmp_path / "kept.jsonl")
    code, out, err = run_here(ROOT / "eval.py", str(kept), "--plot", tiny_run)
    assert code == 0 and os.path.getsize(tmp_path / "compare.png") > 5000, err
    code, out, err = run_here(ROOT / "eval.py", str(run), "--plot", str(tmp_path))
    assert code == 2 and "no out.jsonl" in err
