"""Claim: decoding emits only what each stream may say, keeps the delay, and answers from the command line."""
import subprocess
import sys

import pytest
import soundfile
import torch
from conftest import ROOT

from data import Dataset
from heads import stream_logits
from interleave import EOS, PAD, SPEECH, TEXT, delay, generation_prefix, speech_codes
from model import Model, ModelConfig
from sample import Speaker, generate, pick


@pytest.fixture(scope="module")
def model(toy):
    config = ModelConfig(toy.size, toy.streams, toy.text, n_layer=2,
                          n_head=2, n_kv_head=1, d_model=32, d_ff=64)
    return Model(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)



def test_each_stream_only_says_its_own_ids(toy, toy_example, model):
    """At a temperature so high that every allowed id is drawn, none of another stream or modality appears."""
    nothing = {"speech": toy_example()["speech"][:0]}
    prefixes = [generation_prefix(toy, "tts", toy_example(5, 2 + i, seed=i) | nothing) for i in range(8)]
    generator = torch.Generator().manual_seed(0)
    options = (20, 5, 100.0, 100.0, 1000, generator)
    drawn = torch.cat([frames for frames, _ in generate(model, toy, prefixes, SPEECH, *options)])
    for n, (start, end) in enumerate(toy.streams):
        assert set(drawn[:, n].tolist()) == set(range(start, end)), f"stream {n}"
    text = torch.cat([frames for frames, _ in generate(model, toy, prefixes, TEXT, *options)])
    assert set(text[:, 0].tolist()) == set(range(toy.text_start, toy.size)) and (text[:, 1:] == PAD).all()
    assert EOS not in drawn


def test_greedy_decoding_is_the_argmax_of_the_full_forward(toy, toy_example, model):
    """We decode, then feed the whole delayed sequence at once: every token must be the best of its mask."""
    nothing = {"speech": toy_example()["speech"][:0]}
    prefixes = [generation_prefix(toy, "tts", toy_example(4, n, seed=n) | nothing) for n in (2, 5)]
    for prefix, (frames, _) in zip(prefixes, generate(model, toy, prefixes, SPEECH, 12, 12)):
        assert len(frames) == 12
        tail = torch.full((8, 9), PAD)
        tail[0, 0] = EOS
        delayed = delay(torch.cat([prefix, frames, tail]))
        hidden = model(delayed, [len(delayed)])
        for t in range(len(frames)):
            for n, (start, end) in enumerate(toy.streams):
                row = len(prefix) + t + n - 1                       # predicts the delayed row of this token
                logits = stream_logits(model, hidden[row], n, slice(start, end))
                assert frames[t, n] == start + logits.argmax()


def test_continuing_speech_keeps_the_acoustic_tokens_that_were_due(toy, toy_example, model):
    speech = toy_example(6)["speech"]
    prefix = generation_prefix(toy, "speech", {"speech": speech})
    [(frames, ended)] = generate(model, toy, [prefix], SPEECH, 4, 4)
    assert torch.equal(prefix[-6:], speech) and len(frames) == 4 and not ended
    codes = speech_codes(toy, frames)
    assert (codes >= 0).all() and codes[:, 0].max() < 10 and codes[:, 1:].max() < 8


def test_top_k_and_temperature():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(500, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(pick(logits, 1.0, 2, generator).tolist()) == {1, 2} and set(pick(logits, 0, 4).tolist()) == {1}
    cold, hot = ((pick(logits, t, 4, generator) == 1).float().mean() for t in (0.3, 3.0))
    assert cold > 0.9 > 0.6 > hot


def test_batches_decode_like_single_utterances(tiny_run, tiny_data):
    speaker, dataset = Speaker(tiny_run), Dataset(tiny_data, "seen")
    codes = [dataset[i][0] for i in range(4)]
    assert speaker.transcribe(codes) == [text for one in codes for text in speaker.transcribe([one])]


def test_the_command_line_speaks_and_listens(tiny_run, tiny_data, tmp_path):
    sample = [sys.executable, str(ROOT / "sample.py"), tiny_run]
    voice = Dataset(tiny_data, "unseen").info["audio"][0]
    out = str(tmp_path / "x.wav")

    def call(*arguments):
        return subprocess.run([*sample, *arguments], capture_output=True, text=True)

    assert len(call("asr", voice, voice).stdout.splitlines()) == 2
    assert "x.wav" in call("tts", "seven three five", "--prompt", voice, "--out", out).stdout
    wav, sr = soundfile.read(out)
    assert sr == 16000 and len(wav) % 320 == 0
    assert call("continue", voice, "--out", out).returncode == 0
    assert soundfile.info(out).duration > soundfile.info(voice).duration
    assert call("text", "seven three").stdout.startswith("seven three")
    for arguments, message in ((("tts", "one"), "without a voice prompt"),
                               (("asr", "none.wav"), "no such file"),
                               (("tts", " ", "--prompt", voice), "text is empty")):
        failed = call(*arguments)
        assert failed.returncode == 2 and message in failed.stderr and "Traceback" not in failed.stderr
