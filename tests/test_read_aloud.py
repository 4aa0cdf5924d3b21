"""Claim: a book becomes passages whose words are known, spoken by the voices that are there."""
import os
import sys

import numpy as np
import pytest

import read_aloud
from corpora import Manifest
from tokenize_audio import load_audio

BOOK = ("CHAPTER I. Mr. Bennet was so odd a mixture of quick parts, sarcastic humour and reserve, that his "
        "wife did not know him -- she said. In 1813 she learned it. “It’s a truth,” said Mrs. Bennet, who "
        "was not the wisest of women, “which nobody would dream of denying.” Nobody did!\n\n") * 9

FLITE = """#!{python}
import sys, numpy, soundfile
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
stretch = float(given["--setf"].split("=")[1])
n = int(800 * stretch * len(given["-t"]))               # 50 ms a letter: a hum of 200 Hz
soundfile.write(given["-o"], 0.1 * numpy.sin(numpy.arange(n) * 2 * numpy.pi * 200 / 16000), 16000)
"""


def test_passages_are_whole_sentences_that_anybody_reads_alike():
    found = list(read_aloud.passages(BOOK, np.random.default_rng(0)))
    assert found and not any(sign in " ".join(found) for sign in ("1813", "CHAPTER", "Mr.", "_", "--"))
    for passage in found:
        assert passage[-1] in ".!?" and 8 <= len(passage.split()) <= 75
    text = read_aloud.transcript(found[0])
    assert text.startswith("mister bennet was so odd a mixture of quick parts sarcastic humour and reserve")
    assert read_aloud.transcript("'It's well-known,' he said - \"yes.\"") == "it's well known he said yes"


@pytest.fixture
def flite(tmp_path, monkeypatch):
    """A machine with a flite that hums, without hibari, and with a book."""
    monkeypatch.setitem(sys.modules, "hibari", None)
    flite = tmp_path / "bin/flite"
    flite.parent.mkdir()
    flite.write_text(FLITE.format(python=sys.executable))
    flite.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flite.parent}:{os.environ['PATH']}")
    (tmp_path / "book.txt").write_text(BOOK)


def test_one_voice_as_it_is(flite, tmp_path):
    """For synthesis: one voice at its own pitch and pace; short sentences of another split to test it."""
    job = [str(tmp_path / "one"), str(tmp_path / "book.txt"), "--hours=1"]
    read_aloud.main([*job, "--voice=slt", "--words", "2", "9", "--split=seen"])
    manifest = Manifest(str(tmp_path / "one/manifest.tsv"))
    rows = list(manifest.rows(manifest.numbers("seen")))
    assert rows and not len(manifest.numbers("train")) and {row["speaker"] for row in rows} == {"slt-1.0"}
    for row in rows:
        wav, letters = load_audio(row["audio"]), len(row["text"])
        assert abs(np.abs(np.fft.rfft(wav)).argmax() * 16000 / len(wav) - 200) < 2 * 16000 / len(wav)
        assert 0 <= len(wav) / 16000 - 0.05 * letters < 0.05 * 12 and 2 <= len(row["text"].split()) <= 9
    with pytest.raises(ValueError, match="no voice hibari here"):
        read_aloud.main([*job, "--voice=hibari"])
    with pytest.raises(ValueError, match="MAX above MIN"):
        read_aloud.main([*job, "--words", "9", "2"])


def test_a_manifest_of_spoken_passages(flite, tmp_path):
    job = [str(tmp_path / "aloud"), str(tmp_path / "book.txt"), "--hours=1"]
    read_aloud.main(job)
    manifest = Manifest(str(tmp_path / "aloud/manifest.tsv"))
    rows = list(manifest.rows(manifest.numbers("train")))
    found = set(read_aloud.passages(BOOK, np.random.default_rng(0)))
    assert {row["text"] for row in rows} == set(map(read_aloud.transcript, found)) and not manifest.rejects
    for row in rows:                    # the pitch moves with the speaker, the pace stays within its bounds
        wav, (_, pitch) = load_audio(row["audio"]), row["speaker"].split("-")
        hertz = np.abs(np.fft.rfft(wav)).argmax() * 16000 / len(wav)
        assert abs(hertz - 200 * float(pitch)) < 2
        seconds = 0.05 * len(row["text"])                   # at pace 1, its punctuation not counted
        assert 1 / 1.2 < len(wav) / 16000 / seconds < 1.1 / 0.85
    one = rows[0]["audio"]
    written = os.stat(one).st_mtime_ns
    os.remove(rows[1]["audio"])         # as if killed before it
    read_aloud.main(job)
    assert os.path.exists(rows[1]["audio"]) and os.stat(one).st_mtime_ns == written


def test_without_a_voice_it_says_where_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hibari", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "book.txt").write_text(BOOK)
    with pytest.raises(ValueError, match="pip install hibari-tts"):
        read_aloud.main([str(tmp_path / "aloud"), str(tmp_path / "book.txt")])
