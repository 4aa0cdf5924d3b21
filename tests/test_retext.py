"""Claim: another text tokenizer costs no audio: the shards are those that prepare.py would make with it."""
import os
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_here

import prepare
from align import save_places, semantic_tokens
from data import Dataset
from retext import retext
from shards import is_prepared


def test_shards_are_those_of_a_preparation_byte_for_byte(tiny_data, tmp_path, monkeypatch):
    """From words to letters: the same arrays and lists as from the manifest, whatever was cut off before."""
    import retext as module
    settings = prepare.SETTINGS | {"corpus": f"{tiny_data}/corpus/manifest.tsv", "text_model": "char",
                                   "audio_tokenizer": f"{tiny_data}/audio_tokenizer"}
    whole, new = prepare.prepare(settings, str(tmp_path), n_process=1), str(tmp_path / "new")
    done, real = [], module.retext_shard

    def killed(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(module, "retext_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            retext(tiny_data, new, "char")
    assert not os.path.exists(new), "what was cut off is never read"
    retext(tiny_data, new, "char")
    assert is_prepared(new) and sorted(os.listdir(tmp_path)) == sorted([os.path.basename(whole), "new"])
    for shard in sorted(pathlib.Path(whole).glob("*-of-*")):
        assert shard.read_bytes() == (tmp_path / "new" / shard.name).read_bytes(), shard.name
    with open(f"{whole}/rejects.tsv") as theirs, open(f"{new}/rejects.tsv") as ours:
        assert ours.read() == theirs.read()
    with pytest.raises(ValueError, match="is there already"):
        retext(tiny_data, new, "word")


def test_alignments_go_along_and_bad_wishes_are_one_line(tiny_data, tmp_path):
    old = str(tmp_path / "old")
    shutil.copytree(tiny_data, old)
    tokens = semantic_tokens(Dataset(old, "train"))
    save_places(Dataset(old, "train"), [np.zeros(len(row), int) for row in tokens])     # all: the first word
    before = np.load(f"{old}/align.npz")
    assert run_here(ROOT / "retext.py", old, f"{tmp_path}/new", "--text_model=char", "--lower")[0] == 0
    after, vocab = np.load(f"{tmp_path}/new/align.npz"), Dataset(f"{tmp_path}/new", "train").vocab
    assert np.array_equal(before["words"], after["words"])
    assert after["said"].shape == (vocab.n_semantic, vocab.n_text) != before["said"].shape
    with pytest.raises(ValueError, match="not a prepared folder"):
        retext(str(tmp_path), f"{tmp_path}/b")
    with pytest.raises(ValueError, match="needs a size"):
        retext(old, f"{tmp_path}/b", "bpe")
