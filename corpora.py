"""Corpora: what is to be read, said and learned, as a manifest: one row an utterance.

Helper of prepare.py. A manifest is a table with a header, tab-separated or jsonl, with the fields
  id, audio, text, speaker     audio is a path, relative to the manifest; speech alone has "-" for its text,
                               text alone has "-" for its audio
  split                        if you like: train, seen (evaluation, known speakers) or unseen (evaluation,
                               new speakers). Without it one utterance in 50 is held out as seen.
  speed                        if you like: the recording is played so many times faster; without it 1
Corpora as they are downloaded become a manifest by
  python corpora.py manifest.tsv librispeech:train:/data/LibriSpeech/train-clean-100 \
      librispeech:unseen:/data/LibriSpeech/dev-clean vctk:train:/data/VCTK text:train:/data/books
Each argument is LAYOUT:SPLIT:FOLDER. With librispeech@0.9:train:... beside it, the same once more, played
at 0.9 times its speed, pitch and formants with it, as another speaker (speed perturbation, Ko et al. 2015);
with @0.9,1.1 one utterance at 0.9, the next at 1.1, and so on.
"""
import csv
import glob
import json
import os
import zlib
from array import array
from codecs import BOM_UTF8
from copy import copy
from itertools import chain

import numpy as np

from script import run_script

FIELDS, SPLITS = ("id", "audio", "text", "speaker"), ("train", "seen", "unseen")
AUDIO = (".flac", ".wav", ".opus", ".ogg", ".mp3")
TEXT = (".txt", ".jsonl", ".parquet")
SPEEDS = (0.5, 2.0)     # what a recording may be played at
PASSAGE = 300           # words: longer texts are cut, so that each fits into a row of a batch


# ---- manifests ---------------------------------------------------------------------------------------------

class Manifest:
    """The usable rows of a manifest. They stay on disk: in memory are some 20 bytes of each, and the rejects.

    split (M,) int8, a place in SPLITS; speakers: their names; rejects: [(id, reason)].
    """

    def __init__(self, path):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such manifest (tsv or jsonl)")
        self.path, self.base, self.header = path, os.path.dirname(os.path.abspath(path)), None
        offsets, splits, hashes, speakers, self.rejects = array("q"), array("b"), array("q"), set(), []
        with open(path, "rb") as f:
            f.seek(len(BOM_UTF8) * (f.read(len(BOM_UTF8)) == BOM_UTF8))     # some spreadsheets begin with one
            if not path.endswith(".jsonl"):
                self.header = f.readline().decode("utf-8", "replace").rstrip("\r\n").split("\t")
                missing = [field for field in FIELDS if field not in self.header]
                if missing:
                    raise ValueError(f"{path}: its header lacks {', '.join(missing)}; a manifest has the "
                                     "fields id, audio, text, speaker and perhaps split, separated by tabs")
            offset, number = f.tell(), 1 if self.header else 0
            for line in f:
                number += 1
                try:
                    row = self.parse(line)
                except ValueError as problem:
                    known = len(problem.args) == 2
                    self.rejects.append(problem.args if known else (f"line {number}", str(problem)))
                else:
                    if row:
                        offsets.append(offset)
                        splits.append(SPLITS.index(row["split"]))
                        hashes.append(hash(row["id"]))
                        speakers.add(row["speaker"])
                offset += len(line)
        self.offsets, self.split = np.array(offsets, np.int64), np.array(splits, np.int8)
        self.speakers, hashes = sorted(speakers), np.array(hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        again = np.sort(order[1:][hashes[order[1:]] == hashes[order[:-1]]])
        self.rejects += [(row["id"], "duplicate id") for row in self.rows(again)]
        self.offsets, self.split = np.delete(self.offsets, again), np.delete(self.split, again)

    def parse(self, line):
        """A line -> dict with FIELDS, split and speed; audio is a full path, "" where there is none; None for
        an empty line. ValueError(reason) or ValueError(id, reason)."""
        try:
            line = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
        if not line.strip():
            return None
        if self.header:
            values = line.split("\t")
            if len(values) != len(self.header):
                raise ValueError(f"{len(values)} fields, the header has {len(self.header)}")
            raw = dict(zip(self.header, values))
        else:
            try:
                raw = json.loads(line)
            except ValueError:
                raise ValueError("not JSON") from None
            missing = [field for field in FIELDS if not isinstance(raw, dict) or raw.get(field) is None]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}")
        row = {field: str(raw[field]).strip() for field in FIELDS}
        row["split"] = raw.get("split") or ("seen" if zlib.crc32(row["id"].encode()) % 50 == 0 else "train")
        for field in ("id", "audio", "text"):
            if not row[field]:
                raise ValueError(row["id"] or line[:40], f"empty {field}")
        if row["split"] not in SPLITS:
            raise ValueError(row["id"], f"split {row['split']!r}: we know {', '.join(SPLITS)}")
        row["speed"] = to_speed(1 if raw.get("speed") in (None, "") else raw["speed"], row["id"])
        if row["speed"] != 1 and row["split"] != "train":
            raise ValueError(row["id"], "speed other than 1 in evaluation: that is for training speech")
        row["text"] = "" if row["text"] == "-" else row["text"]
        try:
            row["text"].encode()
        except UnicodeEncodeError:
            raise ValueError(row["id"], "its text has half a character (a lone surrogate)") from None
        row["audio"] = "" if row["audio"] == "-" else os.path.join(self.base, row["audio"])
        if not row["text"] and not row["audio"]:
            raise ValueError(row["id"], "neither audio nor text")
        return row

    def numbers(self, split):
        """Row numbers of a split."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def only(self, numbers):
        """Those rows as a small manifest, for another process."""
        part = copy(self)
        part.offsets, part.split, part.speakers, part.rejects = self.offsets[numbers], None, None, None
        return part

    def rows(self, numbers):
        """Those rows, one after the other."""
        with open(self.path, "rb") as f:
            for number in numbers:
                f.seek(self.offsets[number])
                yield self.parse(f.readline())


def to_speed(value, *name):
    """A manifest's speed, or that of an argument -> float. ValueError(*name, reason) if it is none."""
    try:
        speed = float(value)
    except (TypeError, ValueError):
        speed = 0.0
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ValueError(*name, f"speed {value!r}: a number from {SPEEDS[0]} to {SPEEDS[1]}")
    return speed


# ---- layouts -----------------------------------------------------------------------------------------------

def lines(path):
    with open(path, encoding="utf-8") as f:
        return [line.rstrip("\n") for line in f if line.strip()]


def files_below(folder, endings):
    return [path for path in sorted(glob.glob(f"{folder}/**/*", recursive=True)) if path.endswith(endings)]


def audio_files(folder):
    """{name without folder and extension: path} of all audio below a folder."""
    return {os.path.splitext(os.path.basename(path))[0]: path for path in files_below(folder, AUDIO)}


def name_below(folder, path):
    """folder/a/b.wav -> "a-b": files of one name in different folders are different recordings."""
    return os.path.splitext(os.path.relpath(path, folder))[0].replace(os.sep, "-")


def librispeech(folder):
    """speaker/chapter/*.trans.txt, a line "id TEXT" for each audio file beside it."""
    for trans in sorted(glob.glob(f"{folder}/**/*.trans.txt", recursive=True)):
        beside = audio_files(os.path.dirname(trans))
        for line in lines(trans):
            name, _, text = line.partition(" ")
            yield name, beside.get(name, f"{os.path.dirname(trans)}/{name}.flac"), text, name.split("-")[0]


def libritts(folder):
    """speaker/chapter/name.wav with name.normalized.txt beside it."""
    for name, path in audio_files(folder).items():
        text = os.path.splitext(path)[0] + ".normalized.txt"
        yield name, path, " ".join(lines(text)) if os.path.exists(text) else "", name.split("_")[0]


def vctk(folder):
    """txt/p225/p225_001.txt and wav48*/p225/p225_001*.wav or .flac; of two microphones the first."""
    found = audio_files(folder)
    for path in sorted(glob.glob(f"{folder}/txt/*/*.txt")):
        name = os.path.splitext(os.path.basename(path))[0]
        audio = found.get(f"{name}_mic1") or found.get(name) or f"{folder}/{name}.wav"
        yield name, audio, " ".join(lines(path)), name.split("_")[0]


def mls(folder):
    """transcripts.txt, "speaker_book_number <tab> text", audio/speaker/book/name.flac or .opus."""
    for line in lines(f"{folder}/transcripts.txt"):
        name, text = line.split("\t", 1)
        speaker, book, _ = name.split("_")
        base = f"{folder}/audio/{speaker}/{book}/{name}"
        path = next((base + end for end in AUDIO if os.path.exists(base + end)), base + ".flac")
        yield name, path, text, speaker


def fleurs(folder):
    """train.tsv and the like: id, file, raw text, text, ..., gender; audio/*/file. It names no speakers: each
    file is one, its voice prompt is a part of itself, and nothing is spliced."""
    found = audio_files(folder)
    for path in sorted(glob.glob(f"{folder}/*.tsv")):
        for line in lines(path):
            fields = line.split("\t")
            name = os.path.splitext(fields[1])[0]
            yield name, found.get(name, f"{folder}/audio/{fields[1]}"), fields[3], f"fleurs-{name}"


def ljspeech(folder):
    """metadata.csv, "id|text|normalised text", wavs/id.wav; one speaker."""
    for line in lines(f"{folder}/metadata.csv"):
        name, *texts = line.split("|")
        yield name, f"{folder}/wavs/{name}.wav", texts[-1], "ljspeech"


def commonvoice(folder):
    """validated.tsv (or train.tsv) with client_id, path, sentence; clips/path."""
    table = next(path for path in (f"{folder}/validated.tsv", f"{folder}/train.tsv") if os.path.exists(path))
    with open(table, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
            name = os.path.splitext(row["path"])[0]
            yield name, f"{folder}/clips/{row['path']}", row["sentence"], row["client_id"]


def kaldi(folder):
    """wav.scp, text and utt2spk; commands and segments are not run."""
    table = {}
    for name in ("wav.scp", "text", "utt2spk"):
        table[name] = dict((line + " ").split(" ", 1) for line in lines(f"{folder}/{name}"))
    for name, audio in table["wav.scp"].items():
        if audio.strip().endswith("|"):
            raise ValueError(f"{folder}/wav.scp: {name} is a command; write its output to a file first")
        text, speaker = table["text"].get(name, ""), table["utt2spk"].get(name, name)
        yield name, audio.strip(), text.strip(), speaker.strip()


def speech(folder):
    """Audio files without transcripts; whoever speaks, each is taken for a speaker of its own."""
    for path in files_below(folder, AUDIO):
        name = name_below(folder, path)
        yield name, path, "-", name


def text(path):
    """Text alone, a file or all in a folder: .txt (documents between empty lines, or else one a line), .jsonl
    and .parquet with a field or column `text`. Documents are cut into passages of 300 words."""
    folder, paths = path, files_below(path, TEXT)
    if os.path.isfile(path):
        folder, paths = os.path.dirname(path) or ".", [path] if path.endswith(TEXT) else []
    for path in paths:
        name = name_below(folder, path)
        for number, document in enumerate(documents(path)):
            words = str(document or "").encode(errors="ignore").decode().split()    # null; half an emoji
            for start in range(0, len(words), PASSAGE):
                yield f"{name}-{number}-{start}", "-", " ".join(words[start:start + PASSAGE]), "-"


def documents(path):
    """The texts in a .txt, .jsonl or .parquet file."""
    if path.endswith(".parquet"):
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ValueError(f"{path}: to read parquet, pip install pyarrow") from None
        for batch in ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from batch.column("text").to_pylist()
        return
    with open(path, encoding="utf-8", errors="replace") as f:
        if path.endswith(".jsonl"):
            yield from (json.loads(line)["text"] for line in f if line.strip())
            return
        separate = any(not line.strip() for line in f)
        f.seek(0)
        block = []
        for line in chain(f, [""]):
            if block and not (separate and line.strip()):
                yield "".join(block)
                block = []
            if line.strip():
                block.append(line)


def manifest(path, split):
    """The rows of that split of a manifest, to join with others; its file is named, not a folder."""
    found = Manifest(path)
    for row in found.rows(found.numbers(split)):
        if row["speed"] != 1:
            raise ValueError(f"{path}: {row['id']} has a speed; name the layout with @SPEED here instead")
        yield row["id"], row["audio"] or "-", row["text"] or "-", row["speaker"]


LAYOUTS = {f.__name__: f for f in (manifest, librispeech, libritts, vctk, mls, fleurs, ljspeech, commonvoice,
                                   kaldi, speech, text)}


def read_corpus(description):
    """"layout:split:folder" -> generator of the rows of a manifest."""
    layout, split, folder = (description.split(":", 2) + ["", ""])[:3]
    layout, at, speed = layout.partition("@")
    if layout not in LAYOUTS or split not in SPLITS:
        raise ValueError(f"{description!r} is not LAYOUT:SPLIT:FOLDER; layouts are {', '.join(LAYOUTS)}, "
                         f"splits {', '.join(SPLITS)}")
    if not os.path.exists(folder):
        raise ValueError(f"{folder}: no such folder")
    speeds = [f"{to_speed(speed):g}" for speed in speed.split(",")] if at else ["1"]
    own = [split] if layout == "manifest" else []       # the others know no splits
    n = 0
    try:
        for name, path, words, speaker in LAYOUTS[layout](folder, *own):
            played = speeds[n % len(speeds)]
            other = f"sp{played}-" if at else ""
            n += 1
            yield {"id": other + name, "audio": path if path == "-" else os.path.abspath(path),
                   "text": " ".join(words.split()), "speaker": other + speaker, "split": split,
                   "speed": played}
    except (OSError, StopIteration, KeyError, IndexError, RuntimeError) as problem:
        if n:
            raise ValueError(f"{folder}: after {n} rows: {problem}") from None
    if not n:
        raise ValueError(f"{folder} does not look like {layout}: {LAYOUTS[layout].__doc__}")


def main(arguments):
    if len(arguments) < 2 or arguments[0].startswith("-"):
        raise ValueError(__doc__)
    path, *descriptions = arguments
    n, speakers = 0, set()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        for row in chain.from_iterable(map(read_corpus, descriptions)):
            if n == 0 and not path.endswith(".jsonl"):
                f.write("\t".join(row) + "\n")
            f.write((json.dumps(row, ensure_ascii=False) if path.endswith(".jsonl") else
                     "\t".join(row.values())) + "\n")
            n += 1
            speakers.add(row["speaker"])
    os.replace(path + ".tmp", path)
    print(f"{path}: {n} utterances, {len(speakers)} speakers")


if __name__ == "__main__":
    run_script(main)
