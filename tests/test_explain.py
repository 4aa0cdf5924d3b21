"""Claim: the page shows what the model thought, to the digit, and opens from disk by itself."""
import re

import pytest
import torch
from conftest import ROOT, run_here

import explain
from data import Dataset
from heads import token_losses
from interleave import build_sequence, speech_codes, speech_frames, text_frames, training_rows
from speaker import Speaker


@pytest.fixture(scope="module")
def example(tiny_run, tiny_data):
    """A Speaker, and the entries of one utterance as interleave.py takes them."""
    speaker, dataset = Speaker(tiny_run), Dataset(tiny_data, "unseen")
    codes, text, _ = dataset[0]
    speech = speech_frames(speaker.vocab, codes)
    return speaker, {"speech": speech, "text": text_frames(speaker.vocab, text), "prompt": speech[:20]}


@pytest.mark.parametrize("task", ["asr", "tts"])
def test_probabilities_are_those_of_the_loss(example, task):
    speaker, entries = example
    model, vocab, attention = speaker.model, speaker.vocab, {}
    tokens, *of = training_rows([build_sequence(vocab, task, entries, "target")], vocab.weights())
    probability, entropy = explain.inside(model, tokens, *of, attention.__setitem__)
    losses, learned = token_losses(model, model(tokens, [len(tokens)]), *of, "grammar"), of[1] > 0
    torch.testing.assert_close(probability[learned].log(), -losses[learned], rtol=1e-4, atol=1e-4)
    assert probability[~learned].isnan().all() and (entropy[learned] >= 0).all()
    assert sorted(attention) == list(range(model.config.n_layer))
    for part in attention.values():         # (H, S, S): causal shares that sum to one
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:2]))
        assert not part.triu(1).any()


def test_each_value_stands_at_its_token(example):
    """The delay is undone: frame t of stream n has the probability that was predicted n rows later."""
    speaker, entries = example
    aligned, probability, entropy, speech, text, _ = explain.look(speaker, "tts", entries)
    assert torch.equal(aligned[speech], entries["speech"]) and torch.equal(aligned[text], entries["text"])
    assert not probability[speech].isnan().any() and not entropy[speech].isnan().any()
    assert probability[text].isnan().all(), "the text was given"


def test_the_head_that_follows_is_found():
    """Of three heads one walks through the text as the speech goes on."""
    S, text, speech = 30, torch.arange(4, 10), torch.arange(14, 26)
    attention = torch.full((3, S, S), 1 / S)
    attention[1] = 0
    for k, row in enumerate(speech):
        attention[1, row, text[k // 2]] = 1.0
    found = explain.Alignment(speech, text)
    found(0, torch.full((3, S, S), 1 / S))
    found(1, attention)
    assert (found.layer, found.head) == (1, 1) and found.map.shape == (12, 6)
    asked = explain.Alignment(speech, text, (0, 2))
    asked(0, attention)
    assert (asked.layer, asked.head) == (0, 2)


def test_the_picture_has_every_stream(example, monkeypatch):
    """Probability and entropy of all nine, a row each."""
    axes = pytest.importorskip("matplotlib.axes")
    speaker, entries = example
    seen, drawn, imshow = explain.look(speaker, "tts", entries), [], axes.Axes.imshow
    monkeypatch.setattr(axes.Axes, "imshow", lambda self, values, *other, **style: (
        drawn.append(values), imshow(self, values, *other, **style))[1])
    explain.picture("tts", torch.zeros(16000).numpy(), speaker.vocab.stream_names, seen, ["seven"])
    _, probability, entropy, speech, _, _ = seen
    for values, expected in zip(drawn[1:], (probability, entropy)):         # the first is the spectrogram
        torch.testing.assert_close(torch.from_numpy(values), expected[speech].T)


@pytest.mark.parametrize("ended, words", [(True, "ended by itself"), (False, "cut at its limit")])
def test_the_page_says_how_it_ended(example, ended, words, monkeypatch):
    speaker, entries = example
    codes = speech_codes(speaker.vocab, entries["speech"])
    monkeypatch.setattr(Speaker, "recognise", lambda self, codes: [("seven three", ended)])
    monkeypatch.setattr(Speaker, "synthesise", lambda self, *given: [(codes, ended)])
    monkeypatch.setattr(explain, "picture", lambda *given: "")
    read, _ = explain.explain_asr(speaker, torch.zeros(16000).numpy())
    spoken, _ = explain.explain_tts(speaker, "seven", codes.numpy(), None)
    assert words in read and words in spoken


def test_the_command_writes_a_page_that_needs_nothing_else(tiny_run, tiny_data, tmp_path):
    audio = Dataset(tiny_data, "unseen").info["audio"][0]
    page, wav = str(tmp_path / "page.html"), str(tmp_path / "x.wav")
    code, _, err = run_here(ROOT / "sample.py", tiny_run, "tts", "seven", "--prompt", audio, "--out", wav,
                            "--explain", page)
    assert code == 0, err
    content = open(page, encoding="utf-8").read()
    assert content.count("<audio") == 2 and "data:image/png;base64," in content and "acoustic8" in content
    assert not re.search("https?://", content) and "<script" not in content
    code, _, err = run_here(ROOT / "sample.py", tiny_run, "tts", "seven", "--prompt", audio, "--out", wav,
                            "--explain", page, "--head=99,0")
    assert code == 2 and "no head (99, 0)" in err
    code, _, err = run_here(ROOT / "sample.py", tiny_run, "text", "seven", "--explain", page)
    assert code == 2 and "--explain goes with" in err
