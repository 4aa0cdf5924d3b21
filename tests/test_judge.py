"""Claim: a tokenizer is judged by what it does to sound and by whether its tokens tell words apart."""
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_here

from data import Dataset
from judge import cost, judge_sound, judge_words, merged
from tokenize_audio import Tokenizer, load_audio


def test_tokens_of_speech_tell_words_apart_and_random_ones_do_not(tiny_data, tmp_path):
    folder, random = str(tmp_path / "data"), str(tmp_path / "random")
    shutil.copytree(tiny_data, folder)
    assert run_here(ROOT / "align.py", folder)[0] == 0
    shutil.copytree(folder, random)
    for path in (tmp_path / "random").glob("train*codes.npy"):
        codes = np.load(path)
        np.save(path, np.random.default_rng(0).permutation(codes))
    speech, noise = judge_words([folder, random], n=2000)
    assert speech[0] < noise[0] - 3 and 44 < noise[0] < 56, (speech, noise)
    assert speech[1] < speech[0] < speech[2]
    assert merged(np.array([3, 3, 5, 5, 3])) == [3, 5, 3]
    code, out, _ = run_here(ROOT / "judge.py", "words", folder, "--n=50")
    assert code == 0 and "choices between two words are wrong" in out
    align = np.load(f"{folder}/align.npz")
    info, words = Dataset(folder, "train").info, align["words"]
    one = [row for row in words if info["text"][row[0]].split()[row[1]] == "seven"]
    np.savez(f"{random}/align.npz", words=np.array(one), said=align["said"])
    with pytest.raises(ValueError, match="says another too"):
        judge_words([random])
    code, _, err = run_here(ROOT / "judge.py", "words", tiny_data)
    assert code == 2 and "run align.py" in err


def test_sound_is_judged_beside_the_originals(tiny_data):
    """A stand-in for Whisper that understands originals alone finds no errors there, all in the copies."""
    info = Dataset(tiny_data, "unseen").info
    wavs, texts = [load_audio(path) for path in info["audio"][:2]], info["text"][:2]

    class Stub:
        def hear(self, wav):
            return next((text for own, text in zip(wavs, texts) if own is wav), "")

    tokenizer = Tokenizer.load(f"{tiny_data}/audio_tokenizer")
    found = judge_sound(tokenizer, wavs, texts, Stub())
    assert found["WER of the originals, %"] == (0, 0, 0)
    assert found["WER after decoding, %"] == found["WER, lost by it, points"] == (100, 100, 100)
    assert found["seconds"] == pytest.approx(sum(map(len, wavs)) / 16000)
    assert found["encoding, times real time"] > 1
    for measure, least in (("STOI", 0.5), ("PESQ, wide band", 1)):
        mean, low, high = found.get(measure, (2, 2, 2))
        assert least < low <= mean <= high


def test_the_cost_of_a_tokenizer_is_that_of_its_products(tmp_path, tiny_data):
    """What a layer adds is known: 2 FLOP for each weight and frame, and 4 T^2 D for its attention."""
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    less = {}
    for layers in (1, 2):
        config = transformers.HubertConfig(**shape | {"num_hidden_layers": layers}, conv_dim=(8,) * 7,
                                           num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
        transformers.HubertModel(config).save_pretrained(tmp_path / f"{layers}")
        [(direction, speed, less[layers])] = cost(str(tmp_path / f"{layers}"), turns=1)
        assert direction == "encoding" and speed > 1
    T = 630
    assert less[2] - less[1] == 2 * T * (4 * 32 * 32 + 2 * 32 * 64) + 4 * T * T * 32
    code, out, err = run_here(ROOT / "judge.py", "cost", f"{tiny_data}/audio_tokenizer")
    assert code == 0 and out.count("times real time") == 2, err
