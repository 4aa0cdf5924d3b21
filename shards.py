"""Shards: what a prepared folder holds, and how its files are written, checked and described.

Helper of prepare.py in the reading order. numpy reads all of it:
  data/numbers-1a2b3c4d/
    dataset.json             written last: version, settings, sizes, shards of each split, hours, rejects
    rejects.tsv              id and reason of every utterance that was left out
    README.md                a dataset card: the folder can be uploaded as it is, and trained from elsewhere
    audio_tokenizer/, text_tokenizer/    fitted on the training utterances, or copied from a base LLM
    train-00000-of-00064     a shard of the split, in four files:
      .codes.npy             (frames, N) int16: raw codes of all its utterances, one after the other
      .text.npy              (text tokens,) int32: their text ids
      .index.npy             (utterances, 5) int64: first frame, frames, first text id, text ids, speaker
      .json                  written last: version, counts, CRC-32 of the arrays, ids, texts, speakers, audio
  python shards.py data/numbers-1a2b3c4d            checks every checksum
"""
import io
import json
import os
import shutil
import socket
import zlib

import numpy as np
from tqdm import tqdm

from script import run_script

VERSION = 2
SHARD_FILES = ("json", "codes.npy", "text.npy", "index.npy")
AUDIO_FILES = ("audio_tokenizer.json", "codebooks.safetensors")     # what an audio tokenizer's codes mean
CHECKED = 20e9              # bytes: the checksums of more than that are not looked at whenever a run starts


# ---- files -------------------------------------------------------------------------------------------------

def checksum(path):
    """(length, crc32) of a file."""
    crc, n = 0, 0
    with open(path, "rb") as f:
        while piece := f.read(2 ** 24):
            crc, n = zlib.crc32(piece, crc), n + len(piece)
    return [n, crc]


def beside(path):
    """A name to write to before it is renamed to `path`: two machines may write the same at once."""
    return f"{path}.{socket.gethostname()}.{os.getpid()}.tmp"


def write_file(path, data):
    """Write bytes or text beside and rename: a file under its final name is always whole."""
    with open(beside(path), "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    os.replace(beside(path), path)


def copy_folder(source, target):
    """Copy a folder, but for what fit.py keeps in it, beside and rename, in place of what is there."""
    shutil.rmtree(target + ".tmp", ignore_errors=True)
    shutil.copytree(source, target + ".tmp", ignore=shutil.ignore_patterns("fit-*"))
    shutil.rmtree(target, ignore_errors=True)
    os.rename(target + ".tmp", target)


# ---- shards ------------------------------------------------------------------------------------------------

def has_shard(folder, name):
    return all(os.path.exists(f"{folder}/{name}.{part}") for part in SHARD_FILES)


def is_prepared(folder):
    """Is the data there, with all shards that it should have?"""
    if not os.path.exists(f"{folder}/dataset.json"):
        return False
    with open(f"{folder}/dataset.json") as f:
        splits = json.load(f)["splits"].values()
    return all(has_shard(folder, name) for split in splits for name in split["shards"])


def write_shard(folder, name, codes, texts, index, kept, rejects, n_stream):
    """codes [(T, N)] int16, texts [(M,)] int32, index rows as above, kept: rows of the manifest."""
    arrays = {"codes": np.concatenate(codes) if codes else np.zeros((0, n_stream), np.int16),
              "text": np.concatenate(texts) if texts else np.zeros(0, np.int32),
              "index": np.array(index, np.int64).reshape(-1, 5)}
    checksums = {}
    for part, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        checksums[part] = zlib.crc32(buffer.getvalue())
        write_file(f"{folder}/{name}.{part}.npy", buffer.getvalue())
    meta = {"version": VERSION, "utterances": len(kept), "frames": len(arrays["codes"]), "crc32": checksums,
            "rejects": rejects}
    meta |= {field: [row[field] for row in kept] for field in ("id", "text", "speaker", "audio")}
    write_file(f"{folder}/{name}.json", json.dumps(meta))


def check_shards(names, limit=CHECKED):
    """Compare the shards with their checksums, if they are not more than `limit` bytes, else say so.
    ValueError names the damaged file."""
    paths = [f"{name}.{part}.npy" for name in names for part in ("codes", "text", "index")]
    size = sum(os.path.getsize(path) for path in paths)
    if size > limit:
        print(f"{size / 1e9:.0f} GB of shards: checksums are not compared; "
              f"python shards.py {os.path.dirname(names[0])} does")
        return
    for name in tqdm(names, "checksums", unit="shard", mininterval=1, disable=size < 1e9):
        with open(f"{name}.json") as f:
            expected = json.load(f)["crc32"]
        for part, crc in expected.items():
            if checksum(f"{name}.{part}.npy")[1] != crc:
                raise ValueError(f"{name}.{part}.npy is damaged: delete {name}.json and run prepare.py again")


def card(about):
    """The dataset card of a prepared folder, from what dataset.json will say."""
    rows = "".join(f"| {split} | {n['utterances']:,} | {n['hours']:,.2f} | {n['text_tokens']:,} |\n"
                   for split, n in about["splits"].items())
    sizes, n_stream = about["sizes"], (about["sizes"]["n_semantic"] > 0) + about["sizes"]["n_level"]
    shard = about["splits"]["train"]["shards"][0]
    return f"""---
tags: [speech, audio, speech-language-model, nano-opuslm]
---
# Speech tokens and texts

{len(about["speakers"]):,} speakers, {about["frame_hz"]:g} frames a second of {n_stream} tokens: \
{sizes["n_semantic"]} semantic clusters, {sizes["n_level"]} levels of {sizes["n_acoustic"]} acoustic codes. \
{sizes["n_text"]:,} text tokens. {about["rejects"]:,} utterances were left out (rejects.tsv).

| split | utterances | hours | text tokens |
|---|---|---|---|
{rows}
Made by nanoOpusLM's prepare.py; to train on it: `python train.py CONFIG --data=THIS_FOLDER`. To upload it:
`hf upload USER/NAME THIS_FOLDER --repo-type=dataset`. To read it, numpy is enough:

```python
import json, numpy as np
name = "{shard}"
codes = np.load(name + ".codes.npy", mmap_mode="r")     # (frames, {n_stream}) int16, all utterances in a row
text = np.load(name + ".text.npy", mmap_mode="r")       # (text tokens,) int32
about = json.load(open(name + ".json"))                 # id, text, speaker, audio of each utterance; CRC-32
for start, frames, first, tokens, speaker in np.load(name + ".index.npy"):
    speech, ids = codes[start:start + frames], text[first:first + tokens]
```
"""


def main(arguments):
    where = next(iter(arguments), None)
    if not where or not is_prepared(where):
        raise ValueError(f"{where} is not a prepared folder")
    with open(f"{where}/dataset.json") as f:
        splits = json.load(f)["splits"].values()
    found = [f"{where}/{name}" for split in splits for name in split["shards"]]
    check_shards(found, float("inf"))
    print(f"{len(found)} shards are whole")


if __name__ == "__main__":
    run_script(main)
