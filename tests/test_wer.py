"""Claim: Whisper from the hub writes what its logits say, to the end of any audio, and the folder decides
who reads it."""
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import wer
from tokenize_audio import SAMPLE_RATE
from wer import Whisper, open_whisper

transformers = pytest.importorskip("transformers")
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]


@pytest.fixture(scope="module")
def small_whisper(tmp_path_factory):
    """Random weights and a tokenizer of 60 words, in the files of the hub's folders."""
    folder = tmp_path_factory.mktemp("whisper")
    names = [*(f"w{k}" for k in range(60)), *SPECIAL]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(f"{folder}/tokenizer.json")
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=51865, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, max_target_positions=40,
        init_std=0.5, decoder_start_token_id=61, eos_token_id=60, pad_token_id=60, bos_token_id=60,
        suppress_tokens=[*range(61, 51865)], begin_suppress_tokens=[60])).save_pretrained(folder)
    return str(folder)


def test_what_it_writes_is_the_likeliest_after_its_prompt(small_whisper):
    """Step by step from the logits: language, task and no timestamps are said, and only words are written."""
    whisper, noise = Whisper(small_whisper), np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE)
    silence = np.zeros(SAMPLE_RATE // 2)
    padded = np.concatenate([silence, noise, silence]).astype(np.float32)
    mel = whisper.features(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    ids = [61, 62, 63, 64]
    while ids[-1] != 60 and len(ids) < 40:
        with torch.no_grad():
            logits = whisper.model(mel, decoder_input_ids=torch.tensor([ids])).logits[0, -1, :61]
        logits[60] = -torch.inf if len(ids) == 4 else logits[60]
        ids.append(int(logits.argmax()))
    words = " ".join(f"w{i}" for i in ids[4:] if i < 60)
    assert words and whisper.hear(noise) == words


def test_long_audio_is_heard_to_its_end(small_whisper):
    """Cut at its pause into what Whisper holds; each piece is heard as it is alone."""
    whisper, rng = Whisper(small_whisper), np.random.default_rng(0)
    parts = [rng.normal(0, 0.1, 24 * SAMPLE_RATE).astype(np.float32) for _ in range(2)]
    pause = np.zeros(SAMPLE_RATE // 10, np.float32)
    pieces = wer.cut_wav(np.concatenate([parts[0], pause, parts[1]]), 28)
    assert len(pieces) == 2 and abs(len(pieces[0]) - 24.05 * SAMPLE_RATE) < SAMPLE_RATE // 10
    heard = whisper.hear(np.concatenate([parts[0], pause, parts[1]]))
    assert heard == " ".join(map(whisper.hear, pieces)) != whisper.hear(pieces[0])


def test_the_folder_decides_who_reads_it(small_whisper, tmp_path, monkeypatch):
    monkeypatch.setattr(wer, "english", lambda: None)
    found, missing = open_whisper(small_whisper)
    assert isinstance(found, Whisper) and missing is None
    monkeypatch.setattr(wer, "FastWhisper", lambda folder: f"{folder} in CTranslate2 form")
    (tmp_path / "model.bin").touch()
    (tmp_path / "config.json").write_text("{}")
    assert open_whisper(str(tmp_path)) == (f"{tmp_path} in CTranslate2 form", None)


def test_what_is_no_whisper_is_said_in_one_line(small_whisper, tmp_path, monkeypatch):
    monkeypatch.setattr(wer, "english", lambda: None)
    for content, reason in ((None, "No such file"), ({"model_type": "llama"}, "model_type 'llama'"),
                            ({"model_type": "whisper"}, "model.safetensors")):
        if content:
            (tmp_path / "config.json").write_text(json.dumps(content))
        found, missing = open_whisper(str(tmp_path))
        assert found is None and reason in missing and "\n" not in missing
    found, missing = open_whisper(str(tmp_path / "nowhere"))
    assert found is None and "no such folder" in missing and "pip install -e '.[eval]'" in missing
