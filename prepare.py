"""Prepare: a corpus of audio and transcripts becomes a folder of token shards that training maps into memory.

Sixth file of the reading order. The embedded corpus, and any other by its manifest:
  python prepare.py --corpus=numbers
  python prepare.py --corpus=my/manifest.tsv --text_model=bpe --text_vocab=2000
A manifest is tab-separated with a header, or jsonl, with the fields id, audio (a path, relative to the
manifest), text, speaker, and, if you like, split: train, seen (evaluation, known speakers) or unseen
(evaluation, new speakers). Without a split column one utterance in 50 is held out as seen.

The folder is named by a hash of all that shaped it, so that a trial run is never taken for the real one:
  data/numbers-1a2b3c4d/
    dataset.json             written last: version, settings, sizes, shards of each split, hours, rejects
    rejects.tsv              id and reason of every utterance that was left out
    audio_tokenizer/, text_tokenizer/    fitted on the training utterances, or copied from a base LLM
    train-00000-of-00064     a shard of the split, in four files:
      .codes.npy             (frames, N) int16: raw codes of all its utterances, one after the other
      .text.npy              (text tokens,) int32: their text ids
      .index.npy             (utterances, 5) int64: first frame, frames, first text id, text ids, speaker
      .json                  written last: version, counts, CRC-32 of the arrays, ids, texts, speakers, audio
"""
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

from tokenize_audio import Tokenizer, fit_tokenizer, load_audio
from tokenize_text import KINDS, TextTokenizer, make_text_tokenizer

VERSION = 2
SHARDS, UTTERANCES = 64, (50, 1000)     # a split has about so many shards, if those hold so many utterances
SPLITS = ("train", "seen", "unseen")
SHARD_FILES = ("json", "codes.npy", "text.npy", "index.npy")
AUDIO_FILES = ("audio_tokenizer.json", "codebooks.safetensors")
MIN_RMS = 1e-4              # quieter than this is silence

SETTINGS = dict(            # all that shapes the data; train.py's Config has the same names
    corpus="numbers",       # "numbers" or the path of a manifest
    corpus_utterances=9000,     # numbers: training utterances
    eval_utterances=200,    # numbers: evaluation utterances with known voices, and as many with new ones
    data_seed=1,
    n_semantic=256,         # semantic clusters
    n_acoustic=256,         # codes per acoustic level
    n_level=8,              # acoustic levels
    switch_penalty=60.0,    # cost of a change of semantic token, in squared feature distance
    fit_utterances=700,     # the audio tokenizer is fitted on this many training utterances
    audio_tokenizer="",     # folder of a fitted tokenizer (pretrained.py), instead of the sizes above
    lower=False,            # lower-case the texts
    text_model="word",      # word, bpe, unigram, char (sentencepiece), or the folder or hub id of an LLM
    text_vocab=0,           # its size; 0 = as many as the corpus has (word and char)
    max_audio_s=30.0,       # longer utterances are rejected
)


def data_folder(root, settings):
    """The folder of these settings' data: root/<corpus name>-<hash of the settings and of the manifest>."""
    content = {name: value for name, value in settings.items() if name not in ("audio_tokenizer", "lower")}
    content["version"] = VERSION
    content |= {"lower": True} if settings["lower"] else {}
    if settings["audio_tokenizer"]:
        tokenizer = settings["audio_tokenizer"]
        content["audio_tokenizer"] = [checksum(f"{tokenizer}/{name}") for name in AUDIO_FILES]
    name = settings["corpus"]
    if name != "numbers":
        if not os.path.isfile(name):
            raise ValueError(f"corpus {name!r} is neither 'numbers' nor a manifest file (tsv or jsonl)")
        with open(name, "rb") as f:
            content["manifest"] = hashlib.sha256(f.read()).hexdigest()
        name = os.path.splitext(os.path.basename(name))[0]
        content["corpus"] = name
    if settings["text_model"] not in KINDS:
        text_tokenizer = make_text_tokenizer([], settings["text_model"], 0)
        content["text_model"] = hashlib.sha256(text_tokenizer.files["tokenizer.json"]).hexdigest()
        content["n_text"] = text_tokenizer.n_text
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(root, f"{name}-{digest}")


def checksum(path):
    if not os.path.isfile(path):
        raise ValueError(f"{path} is missing: fit the tokenizer first (tokenize_audio.py)")
    with open(path, "rb") as f:
        return zlib.crc32(f.read())


def has_shard(folder, name):
    return all(os.path.exists(f"{folder}/{name}.{part}") for part in SHARD_FILES)


def is_prepared(folder):
    """Is the data there, with all shards that it should have?"""
    if not os.path.exists(f"{folder}/dataset.json"):
        return False
    with open(f"{folder}/dataset.json") as f:
        splits = json.load(f)["splits"].values()
    return all(has_shard(folder, name) for split in splits for name in split["shards"])


def write_file(path, data):
    """Write bytes or text beside and rename: a file under its final name is always whole."""
    with open(path + ".tmp", "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
    os.replace(path + ".tmp", path)


def copy_folder(source, target, names=None):
    """Copy all files, or those named, beside and rename, in place of what is there."""
    shutil.rmtree(target + ".tmp", ignore_errors=True)
    os.makedirs(target + ".tmp")
    for name in names or os.listdir(source):
        shutil.copy(f"{source}/{name}", f"{target}.tmp/{name}")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(target + ".tmp", target)


# ---- manifest ----------------------------------------------------------------------------------------------

def read_manifest(path):
    """-> (rows, rejects): dicts with id, audio (full path), text, speaker, split; rejects [(id, reason)]."""
    with open(path, encoding="utf-8", newline="") as f:
        raw = [json.loads(line) for line in f if line.strip()] if path.endswith(".jsonl") else list(
            csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows, rejects, seen = [], [], set()
    for number, row in enumerate(raw, 1):
        missing = [field for field in ("id", "audio", "text", "speaker") if row.get(field) is None]
        if missing:
            raise ValueError(f"{path}: entry {number} lacks {', '.join(missing)}; "
                             "a manifest has the fields id, audio, text, speaker and perhaps split")
        row = {field: str(row[field]).strip() for field in ("id", "audio", "text", "speaker")} | {
            "split": row.get("split") or (
                "seen" if zlib.crc32(str(row["id"]).encode()) % 50 == 0 else "train")}
        row["audio"] = os.path.join(os.path.dirname(os.path.abspath(path)), row["audio"])
        if row["split"] not in SPLITS:
            raise ValueError(f"{path}: entry {number} has split {row['split']!r}, "
                             f"we know {', '.join(SPLITS)}")
        if row["id"] in seen:
            rejects.append((row["id"], "duplicate id"))
        elif not row["text"]:
            rejects.append((row["id"], "empty text"))
        else:
            rows.append(row)
        seen.add(row["id"])
    return rows, rejects


def read_utterance(row, max_audio_s):
    """The utterance's wav (n,) at 16 kHz. ValueError, with the reason, where it can't be used."""
    wav = load_audio(row["audio"])
    if len(wav) > max_audio_s * Tokenizer.sample_rate:
        raise ValueError(f"{row['audio']}: longer than {max_audio_s:g} s")
    if np.sqrt(np.mean(wav ** 2)) < MIN_RMS:
        raise ValueError(f"{row['audio']}: silent")
    return wav


# ---- tokenizers --------------------------------------------------------------------------------------------

def fit_on(rows, settings, folder):
    """Fit the audio tokenizer on some of the training rows and save it in the folder."""
    rng = np.random.default_rng(settings["data_seed"])
    wavs, used = [], []
    for i in rng.permutation(len(rows))[:settings["fit_utterances"]]:
        try:
            wavs.append(read_utterance(rows[i], settings["max_audio_s"]))
            used.append(rows[i])
        except ValueError:
            pass                                        # listed among the rejects when its shard is made
    if not wavs:
        raise ValueError("no training utterance could be read: see the manifest's audio paths")
    sizes = {name: settings[name] for name in ("n_semantic", "n_acoustic", "n_level", "switch_penalty")}
    tokenizer = fit_tokenizer(wavs, [row["text"] for row in used], [row["speaker"] for row in used],
                              seed=settings["data_seed"], **sizes)
    tokenizer.save(f"{folder}/audio_tokenizer.tmp")
    os.replace(f"{folder}/audio_tokenizer.tmp", f"{folder}/audio_tokenizer")


# ---- shards ------------------------------------------------------------------------------------------------

def make_shard(job):
    """Tokenize some rows into the shard `name` of `folder`; its json, written last, marks it complete."""
    folder, name, rows, speakers, max_audio_s = job
    tokenizer = Tokenizer.load(f"{folder}/audio_tokenizer")
    text_tokenizer = TextTokenizer.load(f"{folder}/text_tokenizer")
    codes, texts, index, kept, rejects = [], [], [], [], []
    frame, token = 0, 0
    for row in rows:
        try:
            code = tokenizer.encode(read_utterance(row, max_audio_s))       # (T, N)
        except ValueError as error:
            rejects.append((row["id"], str(error)))
            continue
        text = np.array(text_tokenizer.encode(row["text"]), np.int32)
        codes.append(code)
        texts.append(text)
        index.append((frame, len(code), token, len(text), speakers[row["speaker"]]))
        frame, token = frame + len(code), token + len(text)
        kept.append(row)
    n_stream = (tokenizer.n_semantic > 0) + tokenizer.n_level
    return write_shard(folder, name, codes, texts, index, kept, rejects, n_stream)


def write_shard(folder, name, codes, texts, index, kept, rejects, n_stream):
    """codes [(T, N)] int16, texts [(M,)] int32, index rows as above, kept: rows of the manifest -> name."""
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
    return name


def _start_worker(parent):
    """One thread a worker; and a worker whose parent was killed ends too, instead of working for nobody."""
    torch.set_num_threads(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- the whole of it ---------------------------------------------------------------------------------------

def prepare(settings, root="data", n_process=None):
    """Make, or finish making, the data of these settings, unless they are complete; returns the folder."""
    folder = data_folder(root, settings)
    if is_prepared(folder):
        return folder
    os.makedirs(folder, exist_ok=True)
    n_process = n_process or os.cpu_count()
    print(f"preparing {folder}", flush=True)
    manifest = settings["corpus"]
    if manifest == "numbers":
        from spoken_numbers import make_corpus
        with tqdm(desc="speaking", unit="shard", mininterval=1) as bar:
            def progress(done, total):
                bar.total = total
                bar.update(done - bar.n)
            manifest = make_corpus(f"{folder}/corpus", settings["corpus_utterances"],
                                   settings["eval_utterances"], settings["data_seed"], n_process, progress)
    rows, rejects = read_manifest(manifest)
    if settings["lower"]:
        rows = [row | {"text": row["text"].lower()} for row in rows]
    splits = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    if not splits["train"]:
        raise ValueError(f"{manifest} has no training utterance")
    if not os.path.exists(f"{folder}/audio_tokenizer"):
        if settings["audio_tokenizer"]:
            copy_folder(settings["audio_tokenizer"], f"{folder}/audio_tokenizer", AUDIO_FILES)
        else:
            fit_on(splits["train"], settings, folder)
    if not os.path.exists(f"{folder}/text_tokenizer"):
        texts = [row["text"] for row in splits["train"]]
        make_text_tokenizer(texts, settings["text_model"], settings["text_vocab"]).save(
            f"{folder}/text_tokenizer")
    speakers = {name: i for i, name in enumerate(sorted({row["speaker"] for row in rows}))}
    names, jobs = {}, []
    for split, part in splits.items():
        size = min(max(-(-len(part) // SHARDS), UTTERANCES[0]), UTTERANCES[1])
        n_shard = -(-len(part) // size)
        names[split] = [f"{split}-{i:05d}-of-{n_shard:05d}" for i in range(n_shard)]
        for i, name in enumerate(names[split]):
            if not has_shard(folder, name):
                chunk = part[i * size:(i + 1) * size]
                jobs.append((folder, name, chunk, speakers, settings["max_audio_s"]))
    n_process = min(n_process, len(jobs) or 1)
    with multiprocessing.get_context("spawn").Pool(n_process, _start_worker, (os.getpid(),)) as pool:
        done = pool.imap_unordered(make_shard, jobs)
        for _ in tqdm(done, "tokenizing", len(jobs), unit="shard", mininterval=1):
            pass
    return finish(folder, settings, names, rejects, speakers)


def finish(folder, settings, names, rejects, speakers):
    """Sum up the shards in dataset.json, list the rejects, and say what there is."""
    tokenizer = Tokenizer.load(f"{folder}/audio_tokenizer")
    text_tokenizer = TextTokenizer.load(f"{folder}/text_tokenizer")
    counts = {}
    for split, shards in names.items():
        metas = [json.load(open(f"{folder}/{name}.json")) for name in shards]
        rejects = rejects + [tuple(reject) for meta in metas for reject in meta["rejects"]]
        counts[split] = {"shards": shards, "utterances": sum(meta["utterances"] for meta in metas),
                         "hours": sum(meta["frames"] for meta in metas) / tokenizer.frame_hz / 3600}
        print(f"{split}: {counts[split]['utterances']} utterances, {counts[split]['hours']:.2f} hours")
    if not counts["train"]["utterances"]:
        raise ValueError(f"no training utterance is usable: {rejects[0][1]} "
                         f"(and {len(rejects) - 1} more rejects)")
    write_file(f"{folder}/rejects.tsv", "".join(f"{name}\t{reason}\n" for name, reason in rejects))
    print(f"{len(speakers)} speakers, {text_tokenizer.n_text} text tokens; {len(rejects)} rejects"
          + (f", listed in {folder}/rejects.tsv" if rejects else ""))
    sizes = {"n_semantic": tokenizer.n_semantic, "n_acoustic": tokenizer.n_acoustic,
             "n_level": tokenizer.n_level, "n_text": text_tokenizer.n_text}
    write_file(f"{folder}/dataset.json", json.dumps(
        {"version": VERSION, "settings": settings, "sizes": sizes, "frame_hz": tokenizer.frame_hz,
         "splits": counts, "rejects": len(rejects), "speakers": list(speakers)}, indent=1))
    return folder


def parse_settings(arguments):
    """['--name=value', ...] over SETTINGS and data_dir -> (settings, data_dir)."""
    settings, root = dict(SETTINGS), "data"
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name == "data_dir":
            root = value
        elif name not in SETTINGS or not argument.startswith("--"):
            raise ValueError(f"unknown setting {argument!r}; there are: {', '.join(SETTINGS)}, data_dir")
        else:
            try:
                kind = type(SETTINGS[name])
                settings[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
            except (ValueError, KeyError):
                raise ValueError(f"{name} takes {type(SETTINGS[name]).__name__}, not {value!r}") from None
    return settings, root


if __name__ == "__main__":
    try:
        print(prepare(*parse_settings(sys.argv[1:])))
    except ValueError as problem:
        print(f"prepare.py: {problem}", file=sys.stderr)
        sys.exit(2)
