"""Align: which word is spoken when, learned from the tokens and transcripts themselves.

Helper of prepare.py, for runs that start from a text LLM on little speech:
  python align.py DATA_FOLDER                          for --rows_from_text=True
  python align.py DATA_FOLDER --pieces=NEW --words=5   and the training utterances cut into pieces of 1 to 5
                                                       words: train on --data=NEW first, on whole ones after
It needs no recogniser. Letters are the states of a hidden Markov model that may only go from left to right:

      frames    3 3 7 7 7 1 1 9 9 4 4 4      semantic tokens
      letters   t t h h h r r e e e e .      each frame is one letter, each letter some frames, pauses between
                                             words may be empty

We start from letters of equal length, count which tokens each letter goes with, find the best path of each
utterance with those counts (Viterbi's algorithm), count again, and so on. Writes align.npz into the folder:
  words     (words, 4) int64: utterance of the train split, number of the word in it, first frame, end frame
  said      (n_semantic, n_text) float32: share of each text token in what is said while a token is active
"""
import argparse
import json
import os
import shutil

import numpy as np
from tqdm import tqdm

from data import Dataset
from script import run_script
from shards import SHARD_FILES, copy_folder, write_file, write_shard
from tokenize_text import TextTokenizer

SKIP = 4.0                  # cost, in nats, of a letter without a frame
NO_PATH = -1e30


def states(text):
    """Letters of a text, a pause before, between and after its words -> letters, word of each (pause: -1)."""
    letters, words = [" "], [-1]
    for number, word in enumerate(text.split()):
        letters += [*word, " "]
        words += [number] * len(word) + [-1]
    return letters, np.array(words)


def best_path(emission, pause):
    """Viterbi: emission (T, L) log probabilities, pause (L,) bool -> (T,) state of each frame, never falling.

    From a state a path goes on in it, to the next, or over one: free if that is a pause, else at SKIP.
    """
    T, L = emission.shape
    jump = np.full(L, -SKIP)
    jump[2:][pause[1:-1]] = 0.0
    score, step = np.full(L, NO_PATH), np.empty((T, L), np.int8)
    score[:2] = emission[0, :2]
    for t in range(1, T):
        ways = np.full((3, L), NO_PATH)
        ways[0], ways[1, 1:], ways[2, 2:] = score, score[:-1], score[:-2] + jump[2:]
        step[t] = ways.argmax(0)
        score = ways.max(0) + emission[t]
    path = np.empty(T, np.int64)
    path[-1] = L - 1 if score[L - 1] >= score[L - 2] else L - 2             # the last pause may be empty
    for t in range(T - 1, 0, -1):
        path[t - 1] = path[t] - step[t, path[t]]
    return path


def align(tokens, texts, n_semantic, n_round=8, say=print):
    """Semantic tokens [(T,)] and their texts -> [(T,)] the number of the word at each frame, -1 in pauses.

    An utterance with more letters than frames can bear gets -1 throughout.
    """
    known = sorted({letter for text in texts for letter in text} | {" "})
    number = {letter: i for i, letter in enumerate(known)}
    models = []
    for text in texts:
        letters, words = states(text)
        models.append((np.array([number[letter] for letter in letters]), words))
    paths = [np.linspace(0, len(letters) - 1e-6, len(row)).astype(int)
             for row, (letters, _) in zip(tokens, models)]
    for round in range(n_round + 1):
        counts = np.full((len(known), n_semantic), 0.1)
        for row, (letters, _), path in zip(tokens, models, paths):
            np.add.at(counts, (letters[path], row), 1)
        if round == n_round:
            break
        log = np.log(counts / counts.sum(1, keepdims=True))                 # (letters, n_semantic)
        total = 0.0
        for i, row in enumerate(tqdm(tokens, f"round {round + 1}", mininterval=2)):
            letters = models[i][0]
            if len(row) * 2 < len(letters):
                continue
            emission = log[letters[:, None], row].T                         # (T, L)
            paths[i] = best_path(emission, letters == number[" "])
            total += emission[np.arange(len(row)), paths[i]].sum()
        say(f"round {round + 1}: {total / sum(map(len, tokens)):.3f} nats a frame")
    return [words[path] if len(row) * 2 >= len(words) else np.full(len(row), -1)
            for row, (_, words), path in zip(tokens, models, paths)]


def spoken_tokens(tokens, places, texts, tokenizer, n_semantic, n_text):
    """What is said while a semantic token is active -> (n_semantic, n_text) shares, 0 for tokens of pauses.

    A word's text tokens are spread evenly over its frames.
    """
    said = np.zeros((n_semantic, n_text), np.float32)
    for row, place, text in zip(tokens, places, texts):
        for number, word in enumerate(text.split()):
            frames = row[place == number]
            pieces = np.array(tokenizer.encode(word if number == 0 else " " + word) if len(frames) else [])
            if len(pieces):
                np.add.at(said, (frames, pieces[np.arange(len(frames)) * len(pieces) // len(frames)]), 1)
    return said / np.maximum(said.sum(1, keepdims=True), 1)


def cut(dataset, folder, places, n_word, seed=0):
    """Write the train split, cut into pieces of 1 to n_word words, as a folder of its own, with the other
    splits and the tokenizers as they are. A piece ends where the next begins; texts are tokenized anew."""
    rng, old = np.random.default_rng(seed), dataset.folder
    tokenizer = TextTokenizer.load(f"{old}/text_tokenizer")
    codes, texts, index, kept, piece_places, frame, token = [], [], [], [], [], 0, 0
    for i, place in enumerate(places):
        words, (row, _, speaker) = dataset.info["text"][i].split(), dataset[i]
        starts = [np.flatnonzero(place == number)[:1] for number in range(len(words))]
        first = 0
        while first < len(words):
            end = min(len(words), first + int(rng.integers(1, n_word + 1)))
            inside = [start for start in (starts[first], *starts[end:end + 1]) if len(start)]
            if len(inside) == 1 + (end < len(words)):       # both borders were found
                begin = int(starts[first][0])
                stop = int(starts[end][0]) if end < len(words) else len(row)
                text = " ".join(words[first:end])
                ids = np.array(tokenizer.encode(text), np.int32)
                codes.append(row[begin:stop].astype(np.int16))
                texts.append(ids)
                here = place[begin:stop] - first
                piece_places.append(np.where((here >= 0) & (here < end - first), here, -1))
                index.append((frame, stop - begin, token, len(ids), speaker))
                frame, token = frame + stop - begin, token + len(ids)
                kept.append({"id": f"{dataset.info['id'][i]}-{first}", "text": text,
                             "speaker": dataset.info["speaker"][i], "audio": dataset.info["audio"][i]})
            first = end
    new, folder = folder, folder.rstrip("/") + ".tmp"       # what is cut off on the way is never read
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    for name in ("audio_tokenizer", "text_tokenizer"):
        copy_folder(f"{old}/{name}", f"{folder}/{name}")
    with open(f"{old}/dataset.json") as f:
        about = json.load(f)
    for split in ("seen", "unseen"):
        for name in about["splits"][split]["shards"]:
            for part in SHARD_FILES:
                shutil.copy(f"{old}/{name}.{part}", f"{folder}/{name}.{part}")
    write_shard(folder, "train-00000", codes, texts, index, kept, [], dataset.vocab.n_stream)
    hours = frame / about["frame_hz"] / 3600
    about["splits"]["train"] = {"shards": ["train-00000"], "utterances": len(kept), "hours": hours}
    write_file(f"{folder}/dataset.json", json.dumps(about, indent=1))
    save_places(Dataset(folder, "train"), piece_places)
    os.rename(folder, new)
    print(f"{new}: {len(kept)} pieces, {hours:.2f} hours")


def save_places(dataset, places):
    """What `align` returned of the dataset's train split -> align.npz in its folder; how many words it has
    places of."""
    words, texts, folder = [], dataset.info["text"], dataset.folder
    tokenizer = TextTokenizer.load(f"{folder}/text_tokenizer")
    for i, place in enumerate(places):
        for number in range(len(texts[i].split())):
            frames = np.flatnonzero(place == number)
            if len(frames):
                words.append((i, number, frames[0], frames[-1] + 1))
    said = spoken_tokens(semantic_tokens(dataset), places, texts, tokenizer, dataset.vocab.n_semantic,
                         dataset.vocab.n_text)
    np.savez_compressed(f"{folder}/align.tmp.npz", words=np.array(words), said=said)
    os.replace(f"{folder}/align.tmp.npz", f"{folder}/align.npz")
    return len(words)


def semantic_tokens(dataset):
    """[(T,)] of each utterance."""
    return [dataset[i][0][:, 0] for i in range(len(dataset))]


def read_places(folder, tokens):
    """align.npz -> what `align` returned."""
    places = [np.full(len(row), -1) for row in tokens]
    for i, number, start, end in np.load(f"{folder}/align.npz")["words"].tolist():
        places[i][start:end] = number
    return places


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="prepared data")
    parser.add_argument("--pieces", help="a new folder for the pieces")
    parser.add_argument("--words", type=int, default=5, help="of a piece, at most")
    args = parser.parse_args(arguments)
    folder = args.folder
    if args.pieces and os.path.exists(args.pieces):
        raise ValueError(f"{args.pieces} is there already: name a new folder")
    dataset = Dataset(folder, "train")
    texts = [text.lower() for text in dataset.info["text"]]
    # speech without a transcript would be one long pause: left out
    tokens = [row if text else row[:0] for row, text in zip(semantic_tokens(dataset), texts)]
    if args.pieces and os.path.exists(f"{folder}/align.npz"):
        return cut(dataset, args.pieces, read_places(folder, tokens), args.words)
    places = align(tokens, texts, dataset.vocab.n_semantic)
    print(f"{folder}/align.npz: {save_places(dataset, places)} words of {len(places)} utterances")
    if args.pieces:
        cut(dataset, args.pieces, places, args.words)


if __name__ == "__main__":
    run_script(main)
