"""Claim: text is judged by what the model itself predicts, the same for one document and for many."""
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_here, shared_folder

from config import load_config
from eval_text import (
    ask,
    base_model,
    bits_per_byte,
    choice_scores,
    log_probabilities,
    multiple_choice,
    read_rows,
)
from heads import stream_logits
from interleave import Vocab, text_frames
from speaker import Speaker
from tokenize_text import TextTokenizer

N_MMLU = int(os.environ.get("NANO_MMLU", 3))        # questions that are asked of transformers too


@pytest.fixture(scope="module")
def speaker(tiny_run):
    return Speaker(tiny_run, dtype="float32")


@pytest.mark.parametrize("published", [False, True])
def test_log_probabilities_are_those_of_the_logits_alone_or_together(speaker, published, monkeypatch):
    """Also of documents that differ in their last id only, of which one is read, and of a published model,
    whose text has a bias of its own."""
    monkeypatch.setattr(speaker.model.config, "published", published)
    bias = torch.randn(speaker.model.head_emb.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(speaker.model.head_emb, "data", bias)
    documents = [([3, 1, 4, 1, 5, 9], 2), ([2, 6], 1), ([5, 3, 5, 8, 9, 7, 9], 6), ([3, 1, 4, 1, 5, 2], 1)]
    together = log_probabilities(speaker.model, speaker.vocab, documents)
    for (ids, n), found in zip(documents, together):
        hidden = speaker.model(text_frames(speaker.vocab, ids), [len(ids)])
        logits = stream_logits(speaker.model, hidden, 0, slice(*speaker.vocab.text)).log_softmax(1)
        expected = logits[range(len(ids) - n - 1, len(ids) - 1), ids[-n:]]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_text_counts_each_of_its_tokens_once(speaker):
    """In one window it is the plain sum; with windows each but the first token is still predicted once."""
    text = "seven three five one"
    ids = speaker.text_tokenizer.encode(text)
    judge = lambda text: bits_per_byte(speaker.model, speaker.vocab, speaker.text_tokenizer, text)
    (bits, *_), (perplexity, *_), _ = judge(text)
    [found] = log_probabilities(speaker.model, speaker.vocab, [(ids, len(ids) - 1)])
    assert perplexity == pytest.approx(math.exp(-float(found.mean())))
    assert bits == pytest.approx(-float(found.sum()) / math.log(2) / len("three five one"))
    (bits, low, high), (perplexity, *_), pieces = judge("one two " * 1100)
    assert 0 < low <= bits <= high < 20 and perplexity < 1000 and len(pieces) == 22
    _, found, n_byte = zip(*pieces)
    assert bits == pytest.approx(sum(found) / sum(n_byte))
    assert sum(n_byte) == pytest.approx(len("one two " * 1100) - len("one  ")), "without the first and last"


def test_the_likeliest_choice_wins_and_letters_follow_their_examples(speaker, tmp_path):
    words = ["one", "two", "three", "four five six"]
    rows = [{"question": "seven", "choices": words, "gold": gold} for gold in range(4)]
    found, each = multiple_choice(speaker.model, speaker.vocab, speaker.text_tokenizer, rows)
    assert sorted(right for _, right, _ in each) == [0, 0, 0, 100], "100 * right, to be averaged"
    assert ask(rows[0], ())[0] == "Question: seven\nAnswer:"
    assert ask(rows[0] | {"ending": True}, ()) == ("seven", [f" {word}" for word in words])
    assert found["acc"][0] == found["acc_norm"][0] == 0.25, "one and the same choice wins four times"
    row = {"question": "Q?", "choices": ["x", "y"], "gold": 1, "subject": "high_school_physics"}
    context, letters = ask(row, [row | {"question": "E?"}, row | {"subject": "law"}])
    assert letters == [" A", " B"]
    assert context.endswith("E?\nA. x\nB. y\nAnswer: B\n\nQ?\nA. x\nB. y\nAnswer:")
    assert "about high school physics." in context
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(str(path), 2) == [rows[0], rows[2]]
    code, out, err = run_here(ROOT / "eval_text.py", speaker.run, f"--choices={path}")
    assert code == 0 and "acc 25.0 %" in out, err
    code, out, err = run_here(ROOT / "eval.py", speaker.run, f"--compare={speaker.run}")
    assert code == 0 and "q.jsonl, % right: 25 and 25, difference +0 (+0 to +0), within chance" in out, err
    path.write_text(json.dumps(rows[0] | {"gold": 4}))
    code, _, err = run_here(ROOT / "eval_text.py", speaker.run, f"--choices={path}")
    assert code == 2 and "line 1 is not a question" in err


def test_mmlu_of_the_real_smollm2_is_what_transformers_gives(smollm2):
    """Log probabilities of the letters after five examples, of three questions, or NANO_MMLU=500."""
    transformers = pytest.importorskip("transformers")
    folder = shared_folder() / "data/text"
    rows, shots = read_rows(folder / "mmlu_test.jsonl", N_MMLU), read_rows(folder / "mmlu_dev.jsonl")
    config = load_config([str(ROOT / "configs/135m.py"), f"--init_from={smollm2}"])
    n_text = TextTokenizer.load(smollm2).n_text
    model, tokenizer = base_model(SimpleNamespace(config=config, vocab=Vocab(9, 9, 8, n_text)), smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    spelling = transformers.AutoTokenizer.from_pretrained(smollm2)
    for row, ours in zip(rows, choice_scores(model, Vocab(9, 9, 8, n_text), tokenizer, rows, shots)):
        context, letters = ask(row, shots)
        with torch.no_grad():
            scores = theirs(**spelling(context, return_tensors="pt")).logits[0, -1].log_softmax(0)
        expected = [float(scores[spelling.encode(letter)[0]]) for letter in letters]
        assert ours == pytest.approx(expected, abs=1e-3)
