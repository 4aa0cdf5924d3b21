"""Corpora: speech corpora as they are downloaded -> a manifest for prepare.py.

Helper, outside the reading order:
  python corpora.py manifest.tsv librispeech:train:/data/LibriSpeech/train-clean-100 \
      librispeech:unseen:/data/LibriSpeech/dev-clean vctk:train:/data/VCTK
Each argument is LAYOUT:SPLIT:FOLDER, split being train, seen or unseen (see prepare.py).
"""
import csv
import glob
import json
import os
import sys

from prepare import read_manifest

AUDIO = (".flac", ".wav", ".opus", ".ogg", ".mp3")


def lines(path):
    with open(path, encoding="utf-8") as f:
        return [line.rstrip("\n") for line in f if line.strip()]


def audio_files(folder):
    """{name without folder and extension: path} of all audio below a folder."""
    return {os.path.splitext(os.path.basename(path))[0]: path
            for path in sorted(glob.glob(f"{folder}/**/*", recursive=True)) if path.endswith(AUDIO)}


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
    """train.tsv and the like: id, file, raw text, text, ..., gender; audio/*/file. It names no speakers."""
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


def manifest(path):
    """A manifest with id, audio, text, speaker, to join with others; its file is named, not a folder."""
    for row in read_manifest(path)[0]:
        yield row["id"], row["audio"], row["text"], row["speaker"]


LAYOUTS = {f.__name__: f for f in (manifest, librispeech, libritts, vctk, mls, fleurs, ljspeech, commonvoice,
                                   kaldi)}


def read_corpus(description):
    """"layout:split:folder" -> rows of a manifest."""
    layout, split, folder = (description.split(":", 2) + ["", ""])[:3]
    if layout not in LAYOUTS or split not in ("train", "seen", "unseen"):
        raise ValueError(f"{description!r} is not LAYOUT:SPLIT:FOLDER; layouts are {', '.join(LAYOUTS)}, "
                         "splits train, seen, unseen")
    if not os.path.exists(folder):
        raise ValueError(f"{folder}: no such folder")
    try:
        rows = [{"id": name, "audio": os.path.abspath(path), "text": " ".join(text.split()),
                 "speaker": speaker, "split": split} for name, path, text, speaker in LAYOUTS[layout](folder)]
    except (OSError, StopIteration, KeyError, IndexError):
        rows = []
    if not rows:
        raise ValueError(f"{folder} does not look like {layout}: {LAYOUTS[layout].__doc__}")
    return rows


def main(arguments):
    if len(arguments) < 2 or arguments[0].startswith("-"):
        raise ValueError(__doc__)
    path, *descriptions = arguments
    rows = [row for description in descriptions for row in read_corpus(description)]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        if path.endswith(".jsonl"):
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            f.writelines("\t".join(fields) + "\n" for fields in [rows[0], *(row.values() for row in rows)])
    os.replace(path + ".tmp", path)
    print(f"{path}: {len(rows)} utterances, {len({row['speaker'] for row in rows})} speakers")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as problem:
        print(f"corpora.py: {problem}", file=sys.stderr)
        sys.exit(2)
