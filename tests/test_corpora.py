"""Claim: corpora as they are downloaded become manifests that prepare.py reads."""
import json
import tracemalloc

import numpy as np
import pytest
import soundfile
from conftest import ROOT, run_here

from corpora import Manifest, read_corpus
from prepare import read_utterance

FILES = {       # layout: {file: content}, audio being empty here; then id, audio, text, speaker of the first
    "librispeech": ({"19/198/19-198.trans.txt": "19-198-0 NORTHANGER ABBEY\n", "19/198/19-198-0.flac": ""},
                    ("19-198-0", "19/198/19-198-0.flac", "NORTHANGER ABBEY", "19")),
    "libritts": ({"84/1/84_1_0.wav": "", "84/1/84_1_0.normalized.txt": "A  street.\n"},
                 ("84_1_0", "84/1/84_1_0.wav", "A street.", "84")),
    "vctk": ({"txt/p225/p225_001.txt": "Please call Stella.", "wav48/p225/p225_001_mic1.flac": "",
              "wav48/p225/p225_001_mic2.flac": ""},
             ("p225_001", "wav48/p225/p225_001_mic1.flac", "Please call Stella.", "p225")),
    "mls": ({"transcripts.txt": "10_20_30\tguten tag\n", "audio/10/20/10_20_30.opus": ""},
            ("10_20_30", "audio/10/20/10_20_30.opus", "guten tag", "10")),
    "fleurs": ({"train.tsv": "1\tx.wav\tRaw.\traw\tr a w\t16000\tMALE\n", "audio/train/x.wav": ""},
               ("x", "audio/train/x.wav", "raw", "fleurs-x")),
    "ljspeech": ({"metadata.csv": "LJ1|Dr. No|Doctor No\n", "wavs/LJ1.wav": ""},
                 ("LJ1", "wavs/LJ1.wav", "Doctor No", "ljspeech")),
    "commonvoice": ({"validated.tsv": "client_id\tpath\tsentence\nab\tc.mp3\tHello\n", "clips/c.mp3": ""},
                    ("c", "clips/c.mp3", "Hello", "ab")),
    "kaldi": ({"wav.scp": "u1 /data/u1.wav\n", "text": "u1 ONE TWO\n", "utt2spk": "u1 spk\n"},
              ("u1", "/data/u1.wav", "ONE TWO", "spk")),
}


@pytest.mark.parametrize("layout", FILES)
def test_each_layout_gives_its_utterances(layout, tmp_path):
    files, (name, audio, text, speaker) = FILES[layout]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    [row] = read_corpus(f"{layout}:unseen:{tmp_path}")
    expected = {"id": name, "audio": str(tmp_path / audio), "text": text, "speaker": speaker}
    assert row == expected | {"split": "unseen", "speed": "1"}
    made = tmp_path / "my" / "all.tsv"          # in a folder that is not there yet
    code, out, _ = run_here(ROOT / "corpora.py", made, f"{layout}:train:{tmp_path}")
    assert code == 0 and "1 utterances, 1 speakers" in out
    found = Manifest(str(made))
    assert list(found.rows([0])) == [row | {"split": "train", "speed": 1.0}] and not found.rejects


def test_speed_perturbation_is_a_row_that_is_played_faster(tmp_path):
    """Pitch and pace go with it, so it counts as another speaker; evaluation is on speech as it was said."""
    t = np.arange(32000) / 16000
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(2 * np.pi * 440 * t), 16000)
    soundfile.write(tmp_path / "b.wav", 0.3 * np.sin(2 * np.pi * 440 * t), 16000)
    (tmp_path / "m.tsv").write_text("id\taudio\ttext\tspeaker\tsplit\na\ta.wav\tone\ts\ttrain\n"
                                    "b\tb.wav\ttwo\ts\tunseen\n")
    code, _, _ = run_here(ROOT / "corpora.py", tmp_path / "all.tsv", f"manifest:train:{tmp_path}/m.tsv",
                          f"manifest@0.8:train:{tmp_path}/m.tsv", f"manifest:unseen:{tmp_path}/m.tsv")
    found = Manifest(str(tmp_path / "all.tsv"))
    rows = list(found.rows(range(3)))
    assert code == 0 and not found.rejects and found.speakers == ["s", "sp0.8-s"]
    assert [(row["id"], row["split"]) for row in rows] \
        == [("a", "train"), ("sp0.8-a", "train"), ("b", "unseen")]
    turns = [(row["id"], row["speed"]) for row in read_corpus(f"speech@0.9,1.10:train:{tmp_path}")]
    assert turns == [("sp0.9-a", "0.9"), ("sp1.1-b", "1.1")], "several speeds take turns"
    plain, slow = (read_utterance(row, 30.0) for row in rows[:2])
    assert len(plain) == 32000 and len(slow) == 40000
    loudest = [np.abs(np.fft.rfft(wav)).argmax() * 16000 / len(wav) for wav in (plain, slow)]
    assert np.allclose(loudest, [440, 352], atol=1)
    for line, reason in (("c\ta.wav\tx\ts\ttrain\tfast\n", "speed 'fast': a number from 0.5 to 2.0"),
                         ("d\ta.wav\tx\ts\tunseen\t0.9\n", "that is for training speech")):
        with open(tmp_path / "all.tsv", "a") as f:
            f.write(line)
        assert reason in Manifest(str(tmp_path / "all.tsv")).rejects[-1][1]
    row = {"audio": "a.wav", "text": "x", "speaker": "s", "split": "train"}
    (tmp_path / "m.jsonl").write_text("".join(
        json.dumps(row | {"id": str(i), "speed": speed}) + "\n" for i, speed in enumerate(([1], 0, None))))
    found = Manifest(str(tmp_path / "m.jsonl"))
    assert [name for name, _ in found.rejects] == ["0", "1"] and len(found.offsets) == 1
    for description, message in ((f"manifest@9:train:{tmp_path}/m.tsv", "speed '9': a number"),
                                 (f"manifest:train:{tmp_path}/all.tsv", "has a speed; name the layout")):
        code, _, err = run_here(ROOT / "corpora.py", tmp_path / "no.tsv", description)
        assert code == 2 and message in err


def test_what_is_no_corpus_is_explained(tmp_path):
    (tmp_path / "wav.scp").write_text("u1 sph2pipe u1.sph |\n")
    (tmp_path / "text").write_text("u1 ONE\n")
    (tmp_path / "utt2spk").write_text("u1 s\n")
    for description, message in ((f"vctk:train:{tmp_path}", "does not look like vctk"),
                                 (f"kaldi:train:{tmp_path}", "is a command"),
                                 (f"kaldi:test:{tmp_path}", "splits train, seen, unseen"),
                                 ("mls:train:/no/such", "no such folder")):
        code, _, err = run_here(ROOT / "corpora.py", tmp_path / "m.tsv", description)
        assert code == 2 and message in err


def test_a_manifest_stays_on_disk(tmp_path):
    """A row costs some 20 bytes of memory, however long its line; any row is read when it is wanted."""
    path, n = tmp_path / "many.tsv", 40_000
    with open(path, "w") as f:
        f.write("id\taudio\ttext\tspeaker\tsplit\n")
        f.writelines(f"u{i}\t{i}.flac\t{'word ' * 20}{i}\ts{i % 10}\ttrain\n" for i in range(n))
    tracemalloc.start()
    found = Manifest(str(path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 25 * n and peak < 80 * n, f"{kept / n:.0f} bytes a row, {peak / n:.0f} at the peak"
    assert len(found.numbers("train")) == n and len(found.speakers) == 10
    [row] = found.rows([31_415])
    assert row["id"] == "u31415" and row["text"].endswith(" 31415")
    [row] = found.only(np.array([5, 7])).rows([1])
    assert row["id"] == "u7", "a part of it knows its own rows"


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    """Recorders number from 1 each day: none may take another's place, or be rejected as its double."""
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "01.wav").write_text("")
        (tmp_path / day / "01.txt").write_text(f"said on {day}\n")
    spoken, written = (list(read_corpus(f"{layout}:train:{tmp_path}")) for layout in ("speech", "text"))
    assert [row["id"] for row in spoken] == ["monday-01", "tuesday-01"]
    assert [row["audio"] for row in spoken] == [str(tmp_path / f"{row['id'][:-3]}/01.wav") for row in spoken]
    assert len({row["id"] for row in written}) == 2


def test_texts_become_passages(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nof a paragraph.\n\nAnother.\n")
    (tmp_path / "lines.txt").write_text("First.\nSecond.\n")
    (tmp_path / "web.jsonl").write_text('{"text": "' + "many words " * 200
                                        + '"}\n{"text": null}\n{"text": "\\ud83d "}\n')
    rows = list(read_corpus(f"text:train:{tmp_path}"))
    texts = [row["text"] for row in rows]
    assert texts[:4] == ["One line of a paragraph.", "Another.", "First.", "Second."]
    assert [len(text.split()) for text in texts[4:]] == [300, 100], "long ones are cut"
    assert all(row["audio"] == "-" for row in rows) and len({row["id"] for row in rows}) == len(rows)
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    parquet.write_table(pyarrow.table({"text": ["from a table"]}), tmp_path / "t.parquet")
    assert [row["text"] for row in read_corpus(f"text:train:{tmp_path}/t.parquet")] == ["from a table"]


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    """Spreadsheets on Windows write one; it is no part of the first field's name, of either form."""
    (tmp_path / "m.tsv").write_text("id\taudio\ttext\tspeaker\nu1\t-\tone\ts\n", encoding="utf-8-sig")
    row = {"id": "u1", "audio": "-", "text": "one", "speaker": "s"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    for name in ("m.tsv", "m.jsonl"):
        found = Manifest(str(tmp_path / name))
        assert [row["id"] for row in found.rows([0])] == ["u1"] and not found.rejects
