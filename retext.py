"""Retext: a prepared folder once more, its texts in other tokens; the audio's tokens are taken as they are.

Helper of prepare.py in the reading order, after align.py. Another base LLM, or fewer merges of the same,
without tokenizing the audio again, which is nearly all of the work:
  python retext.py data/libri-1a2b3c4d data/libri600 --text_model=smollm2 --text_vocab=600
text_model and text_vocab are those of prepare.py; --lower makes capitals small. What align.py knows of the
old folder goes along. Killed, it goes on. A tokenizer of our own is fitted on the texts that the old folder
holds; prepare.py fits it on the manifest's, those of rejected recordings too.
"""
import argparse
import hashlib
import json
import os
import shutil
from itertools import islice

import numpy as np

from align import read_places, save_places, semantic_tokens
from data import Dataset
from prepare import FIT_TEXTS
from script import run_script
from shards import card, copy_folder, has_shard, is_prepared, write_file, write_shard
from tokenize_text import make_text_tokenizer


def read_meta(folder, name):
    with open(f"{folder}/{name}.json") as f:
        return json.load(f)


def retext_shard(old, folder, name, tokenizer, lower):
    """Write the shard `name` of the folder `old` into `folder`, with its texts in the tokenizer's tokens."""
    meta = read_meta(old, name)
    codes, index = (np.load(f"{old}/{name}.{part}.npy") for part in ("codes", "index"))
    fields = {field: meta[field] for field in ("id", "text", "speaker", "audio")}
    fields["text"] = [lower(text) for text in meta["text"]]
    texts = [np.array(tokenizer.encode(text), np.int32) for text in fields["text"]]
    lengths = np.array([len(ids) for ids in texts], np.int64)
    index[:, 2], index[:, 3] = np.cumsum(lengths) - lengths, lengths
    kept = [dict(zip(fields, row)) for row in zip(*fields.values())]
    write_shard(folder, name, [codes], texts, index, kept, meta["rejects"], codes.shape[1])
    return int(lengths.sum())


def retext(old, folder, text_model="word", text_vocab=0, lower=False):
    """Make `folder` from the prepared folder `old` -> what its dataset.json says. ValueError: `old` is not
    prepared, or `folder` is there already. text_model, text_vocab, lower: as in prepare.SETTINGS."""
    if not is_prepared(old):
        raise ValueError(f"{old} is not a prepared folder, or not whole: prepare.py makes it")
    if os.path.exists(folder):
        raise ValueError(f"{folder} is there already: name a new folder")
    small = str.lower if lower else str
    with open(f"{old}/dataset.json") as f:
        about = json.load(f)
    names = about["splits"]["train"]["shards"]
    texts = (small(text) for name in names for text in read_meta(old, name)["text"] if text)
    texts = list(islice(texts, 0, None, -(-about["splits"]["train"]["utterances"] // FIT_TEXTS)))
    tokenizer = make_text_tokenizer(texts, text_model, text_vocab)
    begun = hashlib.sha256(repr([about, sorted(tokenizer.files.items()), lower]).encode()).hexdigest()[:8]
    place = f"{folder.rstrip('/')}.{begun}.tmp"     # the same once more goes on there
    os.makedirs(place, exist_ok=True)
    copy_folder(f"{old}/audio_tokenizer", f"{place}/audio_tokenizer")
    if not os.path.exists(f"{place}/text_tokenizer"):
        tokenizer.save(f"{place}/text_tokenizer")
    for split in about["splits"].values():
        split["text_tokens"] = 0
        for name in split["shards"]:
            if not has_shard(place, name):
                retext_shard(old, place, name, tokenizer, small)
            split["text_tokens"] += len(np.load(f"{place}/{name}.text.npy", mmap_mode="r"))
    about["settings"] |= {"text_model": text_model, "text_vocab": text_vocab}
    about["settings"]["lower"] |= lower
    about["sizes"]["n_text"] = tokenizer.n_text
    if os.path.exists(f"{old}/rejects.tsv"):
        shutil.copy(f"{old}/rejects.tsv", f"{place}/rejects.tsv")
    write_file(f"{place}/README.md", card(about))
    write_file(f"{place}/dataset.json", json.dumps(about, indent=1))
    if os.path.exists(f"{old}/align.npz"):          # the words are where they were, their tokens are others
        dataset = Dataset(place, "train")
        save_places(dataset, read_places(old, semantic_tokens(dataset)))
    os.rename(place, folder)
    return about


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a prepared folder")
    parser.add_argument("new", help="the folder to make")
    parser.add_argument("--text_model", default="word")
    parser.add_argument("--text_vocab", type=int, default=0)
    parser.add_argument("--lower", action="store_true")
    args = parser.parse_args(arguments)
    about = retext(args.old, args.new, args.text_model, args.text_vocab, args.lower)
    for split, found in about["splits"].items():
        print(f"{split}: {found['utterances']} utterances, {found['text_tokens']} text tokens")


if __name__ == "__main__":
    run_script(main)
