"""Claim: a corpus becomes whole shards or a message; nothing half-written is read, nothing bad hidden."""
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from conftest import ROOT, TINY, run_here

import prepare
from config import Config
from data import Dataset, Loader
from shards import check_shards
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
    after = prepare.data_folder("d", TINY | {"corpus": str(manifest)})
    assert after != before
    assert prepare.data_folder("d", TINY | {"corpus": str(manifest), "eval_utterances": 9}) == after


def test_another_corpus_in_the_tokens_of_the_first(tiny_data, tmp_path):
    """Its tokenizers are named by their folders, so that one run can draw from both."""
    info, folders = Dataset(tiny_data, "train").info, []
    for name, first, text in (("a", 0, dict(text_model="bpe", text_vocab=290)), ("b", 40, {})):
        rows = ["\t".join((f"{name}{i}", info["audio"][i], info["text"][i], "me"))
                for i in range(first, first + 40)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["id\taudio\ttext\tspeaker", *rows]) + "\n")
        text = text or dict(text_model=f"{folders[0]}/text_tokenizer")
        settings = TINY | {"corpus": str(tmp_path / f"{name}.tsv"),
                           "audio_tokenizer": f"{tiny_data}/audio_tokenizer"}
        folders.append(prepare.prepare(settings | text, str(tmp_path / "data")))
    a, b = (Dataset(folder, "train") for folder in folders)
    assert a.vocab == b.vocab and folders[0] != folders[1]
    assert TextTokenizer.load(f"{folders[0]}/text_tokenizer").decode(b[0][1].tolist()) == b.info["text"][0]
    with pytest.raises(ValueError, match="has its size"):
        prepare.prepare(settings | text | {"text_vocab": 300}, str(tmp_path / "data"))


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
    soundfile.write(tmp_path / "clipped.wav", np.clip(50 * wav, -1, 1), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "short.wav", wav[:800], 16000)
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-0.1, 0.1, 32000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:9000])
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "folder.wav").mkdir()
    for name in ("silent", "empty", "long", "corrupt", "missing", "stereo8k", "clipped", "nan", "short",
                 "nothing", "folder"):
        rows.append({"id": name, "audio": f"{name}.wav", "text": "one", "speaker": "a", "split": "train"})
    more = {"audio": good["audio"][61], "speaker": "a", "text": "one", "split": "train"}
    rows.append(more | {"id": "cut", "audio": "cut.flac"})
    rows.append(more | {"id": "notext", "text": "  "})
    rows.append(more | {"id": "noaudio", "audio": ""})
    rows.append(more | {"id": "talker", "text": "one " * 200})
    rows.append(more | {"id": "neither", "audio": "-", "text": "-"})
    rows.append(more | {"id": "lost", "split": "test"})
    rows.append(more | {"id": "g0", "audio": good["audio"][62]})
    rows.append(more | {"id": "words", "audio": "-", "text": "three four"})
    rows.append(more | {"id": "sound", "audio": good["audio"][63], "text": "-"})
    lines = [json.dumps(row).encode() for row in rows]
    lines += [b"{ half a line", json.dumps({"id": "bare", "text": "one"}).encode(), b"\xff\xfe", b"7"]
    path = tmp_path / "messy.jsonl"
    path.write_bytes(b"\n".join(lines))
    return str(path)


def test_what_one_utterance_lacks_does_not_stop_the_others():
    """Tokenized together where that works; else one by one, and the bad one says why."""
    class Stub:
        def encode(self, wav):
            if not wav.any():
                raise ValueError("no frames")
            return wav[:, None]

        def encode_all(self, wavs):
            return [self.encode(wav) for wav in wavs]

    first, bad, last = prepare.encode_each(Stub(), [np.ones(3), np.zeros(2), np.ones(1)])
    assert first.shape == (3, 1) and last.shape == (1, 1) and str(bad) == "no frames"

    class Broken(Stub):
        def start(self, encode):
            raise ValueError("its encoder is not there")

    with pytest.raises(ValueError, match="its encoder is not there"):
        list(prepare.encode_each(Broken(), [np.ones(3)]))


def test_settings_on_the_command_line_have_their_types():
    flags = ["--lower=False", "--n_level=4", "--max_audio_s=9", "--data_dir=x"]
    settings, options = prepare.parse_settings([*flags, "--part=1/2"])
    assert settings == prepare.SETTINGS | {"n_level": 4, "max_audio_s": 9.0}
    assert options == {"root": "x", "part": "1/2"}
    assert prepare.parse_settings(["--lower=True"])[0]["lower"] is True
    for wrong in ("--lower=yes", "--n_level=few", "--none=1"):
        with pytest.raises(ValueError, match="takes|unknown"):
            prepare.parse_settings([wrong])


def test_bad_utterances_are_counted_and_named(messy_corpus, tmp_path, capsys):
    settings = TINY | {"corpus": messy_corpus, "n_semantic": 8, "n_acoustic": 8, "text_model": "char"}
    folder = prepare.prepare(settings, str(tmp_path / "data"), n_process=1)
    rejects = dict(line.rstrip("\n").split("\t") for line in open(f"{folder}/rejects.tsv"))
    n = sum(1 for _ in open(messy_corpus, "rb"))
    expected = {"silent": "silent", "empty": "at least", "long": "longer than 30 s", "clipped": "clipped",
                "corrupt": "not readable", "missing": "no such file", "notext": "empty text",
                "nan": "not finite", "short": "at least", "nothing": "not readable", "folder": "not readable",
                "cut": "not readable", "noaudio": "empty audio", "talker": "letters of text",
                "neither": "neither audio nor text", "lost": "split 'test'", "g0": "duplicate id",
                f"line {n - 3}": "not JSON", f"line {n - 2}": "lacks audio, speaker",
                f"line {n - 1}": "not UTF-8", f"line {n}": "lacks id"}
    assert set(rejects) == set(expected)
    for name, reason in expected.items():
        assert reason in rejects[name], (name, rejects[name])
    dataset = Dataset(folder, "train")
    assert {"lonely", "stereo8k"} <= set(dataset.info["id"])
    assert f"{len(expected)} rejects" in capsys.readouterr().out
    lengths = {name: row[[1, 3]].tolist() for name, row in zip(dataset.info["id"], dataset.index)}
    assert lengths["words"][0] == 0 and lengths["sound"][1] == 0, "text alone and speech alone"
    mixture = {"asr": 1, "speech": 1, "text": 1}
    loader = Loader(dataset, Config(mixture=mixture, row_frames=512, prompt_len=10))
    drawn = {(task, dataset.info["id"][i]) for step in range(60) for row in loader.plan(step)
             for task, (i,), _ in row}
    assert {("text", "words"), ("speech", "sound")} <= drawn
    assert not {("asr", "words"), ("asr", "sound"), ("text", "sound"), ("speech", "words")} & drawn
    card = open(f"{folder}/README.md").read()
    assert f"| train | {len(dataset)} |" in card and "--data=THIS_FOLDER" in card
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


@pytest.fixture
def many(tiny_data, tmp_path):
    """A manifest of 600 utterances (links to a few wavs), and the command that prepares it."""
    good = Dataset(tiny_data, "train").info
    rows = ["id\taudio\ttext\tspeaker"]
    rows += [f"u{i}\t{good['audio'][i % 10]}\t{good['text'][i % 10]}\ts{i % 3}" for i in range(600)]
    (tmp_path / "many.tsv").write_text("\n".join(rows))
    return [sys.executable, str(ROOT / "prepare.py"), f"--corpus={tmp_path / 'many.tsv'}",
            "--n_semantic=8", "--n_acoustic=8", "--fit_utterances=10"]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*-of-*"))
            if path.suffix != ".tmp"}


def test_killed_and_started_again_or_in_parts_the_shards_are_the_same(many, tmp_path):
    """kill -9 while shards are made; then the rest by two machines at once, of which one sums up."""
    whole = subprocess.run([*many, f"--data_dir={tmp_path / 'a'}"], capture_output=True, text=True)
    assert whole.returncode == 0 and "600 utt" not in whole.stdout, whole.stderr
    killed = subprocess.Popen([*many, f"--data_dir={tmp_path / 'b'}"], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    while not list((tmp_path / "b").rglob("*-of-*.json")):
        time.sleep(0.01)
        assert killed.poll() is None, "it ended before a shard was there"
    killed.kill()
    killed.wait()
    assert not list((tmp_path / "b").rglob("dataset.json"))
    before = len(list((tmp_path / "b").rglob("*-of-*.json")))
    parts = [subprocess.Popen([*many, f"--data_dir={tmp_path / 'b'}", f"--part={i}/2"], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
    said = [part.communicate(timeout=120)[0] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], said
    assert any("rejects" in text for text in said)
    first, second = shard_bytes(tmp_path / "a"), shard_bytes(tmp_path / "b")
    assert before < len(first) // 4 and first == second


def test_parts_are_named_and_bad_ones_explained(monkeypatch):
    assert prepare.parse_part("") == (0, 1) and prepare.parse_part("3/16") == (3, 16)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert prepare.parse_part("") == (2, 8)
    for wrong in ("4/4", "a/2", "1", "-1/2"):
        with pytest.raises(ValueError, match="NUMBER/PARTS"):
            prepare.parse_part(wrong)


def test_a_damaged_shard_is_noticed(tiny_data, tmp_path, capsys):
    import shutil
    shutil.copytree(tiny_data, tmp_path / "d")
    data = bytearray((tmp_path / "d/train-00000-of-00003.codes.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "d/train-00000-of-00003.codes.npy").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        Dataset(str(tmp_path / "d"), "train", verify=True)
    code, _, err = run_here(ROOT / "shards.py", tmp_path / "d")
    assert code == 2 and "train-00000-of-00003.codes.npy is damaged" in err
    assert run_here(ROOT / "shards.py", tiny_data)[1] == "5 shards are whole\n"
    check_shards([str(tmp_path / "d/train-00000-of-00003")], limit=1000)
    assert "are not compared" in capsys.readouterr().out, "of very many it is said that we do not look"
    (tmp_path / "d/train-00000-of-00003.codes.npy").write_bytes(data[:-10])
    with pytest.raises(ValueError, match="damaged"):
        Dataset(str(tmp_path / "d"), "train")


@pytest.mark.parametrize("flags, message", [
    (["--corpus=nowhere.tsv"], "neither 'numbers' nor a manifest"), (["--utterances=3"], "unknown setting"),
    (["--text_model=syllable"], "not one of word"), (["--text_model=bpe"], "needs a size"),
    (["--n_level=many"], "takes int")])
def test_wrong_settings_are_explained(flags, message, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings, _ = prepare.parse_settings(flags)
        prepare.data_folder(str(tmp_path), settings)
        make_text_tokenizer(["one two", "two"], settings["text_model"], settings["text_vocab"])
