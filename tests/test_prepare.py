"""Claim: a corpus becomes whole shards or a message; nothing half-written is read, nothing bad hidden."""
import json
import os

import numpy as np
import pytest
import soundfile
from conftest import TINY

import prepare
from data import Dataset
from spoken_numbers import cardinal, digits, is_evaluation_text, plan_corpus, speakers
from tokenize_audio import Tokenizer, load_audio
from tokenize_text import TextTokenizer, make_text_tokenizer


def test_numbers_in_words():
    assert [cardinal(n) for n in (0, 13, 40, 206, 999, 1000, 1005, 9999)] == [
        "zero", "thirteen", "forty", "two hundred and six", "nine hundred and ninety nine", "one thousand",
        "one thousand and five", "nine thousand nine hundred and ninety nine"]
    assert digits("0735") == "zero seven three five"


@pytest.mark.parametrize("seed", [1, 2])
def test_evaluation_texts_and_voices_are_never_trained_on(seed):
    plan = plan_corpus(3000, 100, seed)
    texts = {split: {text for _, text, _, s in plan if s == split} for split in prepare.SPLITS}
    voices = {split: {voice for _, _, voice, s in plan if s == split} for split in prepare.SPLITS}
    assert not texts["train"] & (texts["seen"] | texts["unseen"])
    assert not any(map(is_evaluation_text, texts["train"]))
    assert voices["seen"] <= voices["train"] and not voices["unseen"] & voices["train"]
    assert len(voices["train"]) == 48 and len(voices["unseen"]) == 8
    table = speakers()
    variants = {split: {table[v][0].split("+")[1] for v in voices[split]} for split in ("unseen", "train")}
    assert not variants["unseen"] & variants["train"]


def test_shards_hold_what_the_tokenizers_said(tiny_data):
    """An utterance read back from its shard has the codes and the text of its own audio and transcript."""
    dataset = Dataset(tiny_data, "train", verify=True)
    tokenizer = Tokenizer.load(f"{tiny_data}/audio_tokenizer")
    assert len(dataset) == 150
    for i in (0, 77, 149):
        codes, text, speaker = dataset[i]
        assert np.array_equal(codes, tokenizer.encode(load_audio(dataset.info["audio"][i])))
        model = TextTokenizer.load(f"{tiny_data}/text_tokenizer")
        assert model.decode(text) == dataset.info["text"][i]
        assert len(text) == len(dataset.info["text"][i].split()), "whole words are the text tokens of numbers"


def test_speech_is_reproducible_shard_by_shard(tiny_data, tmp_path):
    """espeak-ng keeps state between calls, so the same plan in a fresh process gives the same samples."""
    from spoken_numbers import make_corpus
    make_corpus(str(tmp_path), 150, 6, TINY["data_seed"], 1, lambda *_: None)
    for name in ("train000000", "train000149", "seen0003"):
        again, first = (load_audio(f"{folder}/wav/000/{name}.wav")
                        for folder in (tmp_path, f"{tiny_data}/corpus"))
        assert np.array_equal(again, first)


def test_the_folder_is_named_by_what_shaped_it(tmp_path):
    changes = ({}, {"corpus_utterances": 151}, {"switch_penalty": 61.0})
    names = {prepare.data_folder("d", TINY | change) for change in changes}
    assert len(names) == 3
    manifest = tmp_path / "m.tsv"
    manifest.write_text("id\taudio\ttext\tspeaker\n")
    before = prepare.data_folder("d", TINY | {"corpus": str(manifest)})
    manifest.write_text("id\taudio\ttext\tspeaker\nx\tx.wav\thi\tme\n")
    assert prepare.data_folder("d", TINY | {"corpus": str(manifest)}) != before


@pytest.fixture
def messy_corpus(tmp_path, tiny_data):
    """A jsonl manifest with good utterances of two speakers and every kind of bad one."""
    good = Dataset(tiny_data, "train").info
    rows = [{"id": f"g{i}", "audio": good["audio"][i], "text": good["text"][i], "speaker": "a"}
            for i in range(40)]
    rows.append({"id": "lonely", "audio": good["audio"][50], "text": "one two", "speaker": "b",
                 "split": "train"})
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 16000 * 31), 16000)
    (tmp_path / "corrupt.wav").write_bytes(b"not audio")
    wav = load_audio(good["audio"][60])
    soundfile.write(tmp_path / "stereo8k.wav", np.stack([wav[::2], wav[::2]], 1), 8000)
    for name in ("silent", "empty", "long", "corrupt", "missing", "stereo8k"):
        rows.append({"id": name, "audio": f"{name}.wav", "text": "one", "speaker": "a", "split": "train"})
    rows.append({"id": "notext", "audio": good["audio"][61], "text": "  ", "speaker": "a"})
    rows.append({"id": "g0", "audio": good["audio"][62], "text": "one", "speaker": "a"})
    path = tmp_path / "messy.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_settings_on_the_command_line_have_their_types():
    flags = ["--lower=False", "--n_level=4", "--max_audio_s=9", "--data_dir=x"]
    settings, root = prepare.parse_settings(flags)
    assert settings == prepare.SETTINGS | {"n_level": 4, "max_audio_s": 9.0} and root == "x"
    assert prepare.parse_settings(["--lower=True"])[0]["lower"] is True
    for wrong in ("--lower=yes", "--n_level=few", "--none=1"):
        with pytest.raises(ValueError, match="takes|unknown"):
            prepare.parse_settings([wrong])


def test_bad_utterances_are_counted_and_named(messy_corpus, tmp_path, capsys):
    settings = TINY | {"corpus": messy_corpus, "n_semantic": 8, "n_acoustic": 8, "text_model": "char"}
    folder = prepare.prepare(settings, str(tmp_path / "data"), n_process=1)
    rejects = dict(line.rstrip("\n").split("\t") for line in open(f"{folder}/rejects.tsv"))
    expected = {"silent": "silent", "empty": "at least", "long": "longer than 30 s",
                "corrupt": "not readable", "missing": "no such file", "notext": "empty text",
                "g0": "duplicate id"}
    assert set(rejects) == set(expected) and all(reason in rejects[name] for name, reason in expected.items())
    dataset = Dataset(folder, "train")
    assert {"lonely", "stereo8k"} <= set(dataset.info["id"])
    assert "7 rejects" in capsys.readouterr().out
    i = dataset.info["id"].index("lonely")
    prompt = dataset.draw_prompt(i, 10, np.random.default_rng(0))
    assert len(prompt) == 10, "a speaker with one utterance prompts itself"


def test_an_interrupted_preparation_goes_on(tiny_data, tmp_path):
    """Without dataset.json the folder is not read; with one shard's json missing, that one is made again."""
    import shutil
    root = tmp_path / "data"
    folder = root / os.path.basename(tiny_data)
    shutil.copytree(tiny_data, folder)
    for name in ("dataset.json", "unseen-00000-of-00001.json"):
        os.remove(folder / name)
    (folder / "unseen-00000-of-00001.codes.npy").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a finished dataset"):
        Dataset(str(folder), "train")
    untouched = os.path.getmtime(folder / "train-00000-of-00003.json")
    assert prepare.prepare(TINY, str(root)) == str(folder)
    assert os.path.getmtime(folder / "train-00000-of-00003.json") == untouched
    assert np.array_equal(Dataset(str(folder), "unseen")[0][0], Dataset(tiny_data, "unseen")[0][0])


def test_a_damaged_shard_is_noticed(tiny_data, tmp_path):
    import shutil
    shutil.copytree(tiny_data, tmp_path / "d")
    data = bytearray((tmp_path / "d/train-00000-of-00003.codes.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "d/train-00000-of-00003.codes.npy").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        Dataset(str(tmp_path / "d"), "train", verify=True)


@pytest.mark.parametrize("flags, message", [
    (["--corpus=nowhere.tsv"], "neither 'numbers' nor a manifest"), (["--utterances=3"], "unknown setting"),
    (["--text_model=syllable"], "not one of word"), (["--text_model=bpe"], "needs a size"),
    (["--n_level=many"], "takes int")])
def test_wrong_settings_are_explained(flags, message, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings, _ = prepare.parse_settings(flags)
        prepare.data_folder(str(tmp_path), settings)
        make_text_tokenizer(["one two", "two"], settings["text_model"], settings["text_vocab"])
