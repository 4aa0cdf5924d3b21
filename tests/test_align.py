"""Claim: words are found in speech tokens without a recogniser, from what goes with what."""
import shutil

import numpy as np
from conftest import ROOT, run_here

from align import align, best_path, spoken_tokens
from data import Dataset
from prepare import is_prepared

WORDS = "the cat sat on a mat and the dog ran to that red hat so no one can tell".split()


def speak(text, rng):
    """Toy speech: a letter sounds mostly as one of its two tokens, for 1 to 4 frames; pauses now and then."""
    tokens, place = [], []
    for number, word in enumerate(text.split()):
        for letter in word:
            n = rng.integers(1, 5)
            sound = 2 * (ord(letter) - 97) + rng.integers(2, size=n)
            noise = rng.integers(54, size=n)
            tokens += np.where(rng.random(n) < 0.8, sound, noise).tolist()
            place += [number] * n
        n = rng.integers(0, 4)
        tokens += [52] * n
        place += [-1] * n
    return np.array(tokens), np.array(place)


def test_words_are_found_where_they_are_spoken():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(150)]
    tokens, truth = zip(*(speak(text, rng) for text in texts))
    found = align(tokens, texts, 54, say=lambda _: None)
    right = np.concatenate([a == b for a, b in zip(found, truth)]).mean()
    assert right > 0.9, right
    lost = align([tokens[0], tokens[1][:3]], texts[:2], 54, 1, say=lambda _: None)[1]
    assert (lost == -1).all(), "three frames can't hold a sentence"

    class Tokenizer:
        def encode(self, word):
            return [WORDS.index(word.strip())]

    said = spoken_tokens(tokens, found, texts, Tokenizer(), 54, len(WORDS))
    assert said[2 * (ord("d") - 97)].argmax() in (WORDS.index("dog"), WORDS.index("and"), WORDS.index("red"))
    assert np.allclose(said.sum(1)[said.sum(1) > 0], 1)


def test_a_path_never_goes_back_and_ends_at_the_end():
    rng = np.random.default_rng(0)
    pause = np.array([True, False, False, True, False, True])
    path = best_path(rng.standard_normal((20, 6)), pause)
    assert path[0] in (0, 1) and path[-1] in (4, 5)
    assert np.diff(path).min() >= 0 and np.diff(path).max() <= 2


def test_pieces_are_data_of_their_own_and_text_starts_the_rows(tiny_data, tmp_path):
    """The folder of pieces is read like any other; said is there for rows_from_text."""
    folder, pieces = str(tmp_path / "data"), str(tmp_path / "pieces")
    shutil.copytree(tiny_data, folder)
    code, out, err = run_here(ROOT / "align.py", folder, f"--pieces={pieces}", "--words=2")
    assert code == 0, err
    assert is_prepared(pieces)
    whole, cut = Dataset(folder, "train", True), Dataset(pieces, "train", True)
    assert len(cut) > len(whole) and cut.vocab == whole.vocab
    assert max(len(text.split()) for text in cut.info["text"]) == 2
    words = [sum(len(text.split()) for text in dataset.info["text"]) for dataset in (whole, cut)]
    assert 0.9 * words[0] < words[1] <= words[0], "few words are lost"
    assert len(Dataset(pieces, "unseen")) == len(Dataset(folder, "unseen"))
    (tmp_path / "longer.tmp").mkdir()           # a run before was cut off
    code, out, _ = run_here(ROOT / "align.py", folder, f"--pieces={tmp_path / 'longer'}", "--words=5")
    assert code == 0 and "round" not in out, "what is aligned is only cut"
    longer = Dataset(str(tmp_path / "longer"), "train")
    assert len(longer) < len(Dataset(pieces, "train"))
    assert max(len(text.split()) for text in longer.info["text"]) > 2
    said = np.load(f"{folder}/align.npz")["said"]
    assert said.shape == (whole.vocab.n_semantic, whole.vocab.n_text)
    words = np.load(f"{pieces}/align.npz")["words"]
    for i, number, start, end in words[:200].tolist():
        assert number < len(cut.info["text"][i].split()) and 0 <= start < end <= cut.index[i, 1]
    starts = {(i, number): start for i, number, start, _ in words.tolist()}
    assert all(starts.get((i, 0), 0) == 0 for i in range(len(cut))), "a piece begins with its first word"
    code, _, err = run_here(ROOT / "retext.py", pieces, f"{tmp_path / 'letters'}", "--text_model=char")
    assert code == 0, f"pieces are prepared data like any other: {err}"
    code, _, err = run_here(ROOT / "align.py", folder, f"--pieces={pieces}")
    assert code == 2 and "there already" in err
