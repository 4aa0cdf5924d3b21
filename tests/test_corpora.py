"""Claim: corpora as they are downloaded become manifests that prepare.py reads."""
import pytest
from conftest import ROOT, run_here

from corpora import Manifest, read_corpus

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
    assert row == expected | {"split": "unseen"}
    code, out, _ = run_here(ROOT / "corpora.py", tmp_path / "all.tsv", f"{layout}:train:{tmp_path}")
    assert code == 0 and "1 utterances, 1 speakers" in out
    found = Manifest(str(tmp_path / "all.tsv"))
    assert list(found.rows([0])) == [row | {"split": "train"}] and not found.rejects


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
