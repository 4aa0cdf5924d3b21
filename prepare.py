"""Prepare: a corpus of audio and transcripts becomes a folder of token shards that training maps into memory.

Sixth file of the reading order. The embedded corpus, and any other by its manifest:
  python prepare.py --corpus=numbers
  python prepare.py --corpus=my/manifest.tsv --text_model=bpe --text_vocab=2000
What a manifest is stands in corpora.py, what a prepared folder holds in shards.py. The folder is named by a
hash of all that shaped it, so that a trial run is never taken for the real one. Killed, it goes on.

Big corpora go over several machines that share a disk, each making its share of the shards: torchrun, or
--part=3/16 for the fourth of 16. Whoever ends last sums up. Pretrained tokenizers use a GPU (--device).
"""
import hashlib
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from corpora import SPLITS, Manifest
from script import run_script
from shards import (
    AUDIO_FILES,
    VERSION,
    beside,
    card,
    checksum,
    copy_folder,
    has_shard,
    is_prepared,
    write_file,
    write_shard,
)
from tokenize_audio import Tokenizer, fit_tokenizer, load_audio
from tokenize_text import KINDS, TextTokenizer, make_text_tokenizer

SHARDS, UTTERANCES = 64, (50, 10_000)   # a split has about so many shards, if those hold so many utterances
MIN_RMS = 1e-4              # quieter than this is silence
CLIPPED = 0.01              # share of samples at full scale
LETTERS_S = 50              # letters a second: nobody speaks so fast, the text is another's
FIT_TEXTS = 200_000         # a text tokenizer of our own is trained on at most so many
TOGETHER = 64               # utterances that a tokenizer gets at once

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
    text_model="word",      # word, bpe, unigram, char (sentencepiece), the folder or hub id of an LLM, or the
                            # text_tokenizer of another prepared folder
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
        missing = [name for name in AUDIO_FILES if not os.path.isfile(f"{tokenizer}/{name}")]
        if missing:
            raise ValueError(f"{tokenizer}/{missing[0]} is missing: fit the tokenizer first "
                             "(tokenize_audio.py)")
        content["audio_tokenizer"] = [checksum(f"{tokenizer}/{name}")[1] for name in AUDIO_FILES]
    name = settings["corpus"]
    if name != "numbers":
        if not os.path.isfile(name):
            raise ValueError(f"corpus {name!r} is neither 'numbers' nor a manifest file (tsv or jsonl)")
        digest = hashlib.sha256()
        with open(name, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        content["manifest"] = digest.hexdigest()
        name = os.path.splitext(os.path.basename(name))[0]
        content["corpus"] = name
        content = {field: value for field, value in content.items()
                   if field not in ("corpus_utterances", "eval_utterances")}       # the numbers' alone
    if settings["text_model"] not in KINDS:
        text_tokenizer = make_text_tokenizer([], settings["text_model"], 0)
        own = "text.model" if "text.model" in text_tokenizer.files else "tokenizer.json"
        content["text_model"] = hashlib.sha256(text_tokenizer.files[own]).hexdigest()
        content["n_text"] = text_tokenizer.n_text
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    return os.path.join(root, f"{name}-{digest}")


# ---- utterances --------------------------------------------------------------------------------------------

def read_utterance(row, max_audio_s):
    """The utterance's wav (n,) at 16 kHz. ValueError, with the reason, where it can't be used."""
    wav = load_audio(row["audio"], row["speed"], max_audio_s)
    seconds, clipped = len(wav) / Tokenizer.sample_rate, np.mean(np.abs(wav) > 0.999)
    if np.sqrt(np.mean(wav ** 2)) < MIN_RMS:
        raise ValueError(f"{row['audio']}: silent")
    if clipped > CLIPPED:
        raise ValueError(f"{row['audio']}: clipped, {100 * clipped:.0f} % of its samples are at full scale")
    if len(row["text"]) > LETTERS_S * seconds:
        raise ValueError(f"{row['audio']}: {len(row['text'])} letters of text for {seconds:.1f} s of speech")
    return wav


# ---- tokenizers --------------------------------------------------------------------------------------------

def fit_on(rows, settings, folder):
    """Fit the audio tokenizer on these training rows and save it in the folder."""
    wavs, used = [], []
    for row in rows:
        try:
            wavs.append(read_utterance(row, settings["max_audio_s"]))
            used.append(row)
        except ValueError:
            pass                                        # listed among the rejects when its shard is made
    if not wavs:
        raise ValueError("no training utterance could be read: see the manifest's audio paths")
    sizes = {name: settings[name] for name in ("n_semantic", "n_acoustic", "n_level", "switch_penalty")}
    tokenizer = fit_tokenizer(wavs, [row["text"] for row in used], [row["speaker"] for row in used],
                              seed=settings["data_seed"], **sizes)
    tokenizer.save(f"{folder}/audio_tokenizer.tmp")
    os.replace(f"{folder}/audio_tokenizer.tmp", f"{folder}/audio_tokenizer")


def make_tokenizers(manifest, settings, folder):
    """Fit or copy what is not there yet; the text tokenizer last, for which other machines wait."""
    train, lower = manifest.numbers("train"), str.lower if settings["lower"] else str
    if not os.path.exists(f"{folder}/audio_tokenizer"):
        if settings["audio_tokenizer"]:
            copy_folder(settings["audio_tokenizer"], f"{folder}/audio_tokenizer")
        else:
            chosen = np.random.default_rng(settings["data_seed"]).permutation(len(train))
            rows = (row for row in manifest.rows(train[chosen]) if row["audio"])
            fit_on(islice(rows, settings["fit_utterances"]), settings, folder)
    if not os.path.exists(f"{folder}/text_tokenizer"):
        rows = manifest.rows(train[::-(-len(train) // FIT_TEXTS)])
        texts = [lower(row["text"]) for row in rows if row["text"]]
        make_text_tokenizer(texts, settings["text_model"], settings["text_vocab"]).save(
            f"{folder}/text_tokenizer")


# ---- shards ------------------------------------------------------------------------------------------------

def encode_each(tokenizer, wavs):
    """wavs [(n,)] -> for each its codes (T, N), or the ValueError that says why there are none. All at once,
    which is faster; one by one where that fails. What is wrong with the tokenizer itself ends it all."""
    if hasattr(tokenizer, "start"):
        tokenizer.start(True)
    try:
        yield from tokenizer.encode_all(wavs)
        return
    except ValueError:
        pass
    for wav in wavs:
        try:
            yield tokenizer.encode(wav)
        except ValueError as problem:
            yield problem


def make_shard(folder, name, manifest, settings):
    """Tokenize the rows of a (part of a) manifest into the shard `name` of `folder`; its json, written last,
    marks it complete. -> utterances, hours."""
    tokenizer = Tokenizer.load(f"{folder}/audio_tokenizer", _worker["device"])
    text_tokenizer = TextTokenizer.load(f"{folder}/text_tokenizer")
    lower = str.lower if settings["lower"] else str
    n_stream = (tokenizer.n_semantic > 0) + tokenizer.n_level
    codes, texts, index, kept, rejects = [], [], [], [], []
    frame, token = 0, 0
    for start in range(0, len(manifest.offsets), TOGETHER):
        rows, wavs = [], []
        for row in manifest.rows(range(start, min(start + TOGETHER, len(manifest.offsets)))):
            row["text"] = lower(row["text"])
            try:
                wavs.append(read_utterance(row, settings["max_audio_s"]) if row["audio"] else None)
                rows.append(row)
            except ValueError as problem:
                rejects.append((row["id"], str(problem)))
        spoken = encode_each(tokenizer, [wav for wav in wavs if wav is not None])
        for row, wav in zip(rows, wavs):
            code = np.zeros((0, n_stream), np.int16) if wav is None else next(spoken)       # (T, N)
            if isinstance(code, ValueError):
                rejects.append((row["id"], str(code)))
                continue
            text = np.array(text_tokenizer.encode(row["text"]), np.int32)
            codes.append(code)
            texts.append(text)
            index.append((frame, len(code), token, len(text), _worker["speakers"][row["speaker"]]))
            frame, token = frame + len(code), token + len(text)
            kept.append(row)
    write_shard(folder, name, codes, texts, index, kept, rejects, n_stream)
    return len(manifest.offsets), frame / tokenizer.frame_hz / 3600


_worker = {"device": "cpu", "speakers": None}       # what a process of the pool has got at its start


def _start_worker(parent, devices, speakers):
    """One thread a worker; and a worker whose parent was killed ends too, instead of working for nobody."""
    torch.set_num_threads(1)
    _worker.update(device=devices.get(), speakers={name: i for i, name in enumerate(speakers)})

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shards(jobs, speakers, n_process, device):
    """jobs [(arguments of make_shard)] in several processes, with a bar that tells hours and speed."""
    context, began, hours = multiprocessing.get_context("spawn"), time.time(), 0.0
    n_gpu = torch.cuda.device_count() if device == "cuda" else 0
    if n_gpu:       # a process for each GPU; under torchrun for the one that is ours
        mine = [int(os.environ["LOCAL_RANK"])] if "LOCAL_RANK" in os.environ else range(n_gpu)
        names = [f"cuda:{i}" for i in mine]
    else:
        share = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        names = ["cpu"] * max(1, min(n_process or os.cpu_count() // share, len(jobs)))
    devices = context.Queue()
    for name in names:
        devices.put(name)
    start = (os.getpid(), devices, speakers)
    with (ProcessPoolExecutor(len(names), context, _start_worker, start) as pool,
          tqdm(total=sum(len(job[2].offsets) for job in jobs), desc="tokenizing", unit="utt", mininterval=1)
          as bar):
        try:
            for done in as_completed([pool.submit(make_shard, *job) for job in jobs]):
                n, more = done.result()
                bar.update(n)
                hours += more
                bar.set_postfix_str(f"{hours:.2f} h, {hours * 3600 / (time.time() - began):.0f} x real time")
        except BrokenProcessPool:
            raise ValueError("a process that made a shard was killed (out of memory?); finished shards stay: "
                             "the same command goes on") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- the whole of it ---------------------------------------------------------------------------------------

def prepare(settings, root="data", n_process=0, part="", device="auto"):
    """Make, or finish making, the data of these settings, unless they are complete; returns the folder.

    n_process: on a CPU, 0 = one a core.  part: "3/16", our share of the work (default: torchrun's rank, or
    all).  device: of pretrained tokenizers, cpu, cuda or auto.
    """
    folder = data_folder(root, settings)
    if is_prepared(folder):
        return folder
    number, parts = parse_part(part)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and settings["audio_tokenizer"] else "cpu"
    os.makedirs(folder, exist_ok=True)
    print(f"preparing {folder}" + (f", part {number} of {parts}" if parts > 1 else ""), flush=True)
    if settings["corpus"] == "numbers":
        if parts > 1:
            raise ValueError("the numbers are made by one machine: leave out torchrun or --part")
        from spoken_numbers import make_corpus
        with tqdm(desc="speaking", unit="shard", mininterval=1) as bar:
            def progress(done, total):
                bar.total = total
                bar.update(done - bar.n)
            path = make_corpus(f"{folder}/corpus", settings["corpus_utterances"], settings["eval_utterances"],
                               settings["data_seed"], n_process or os.cpu_count(), progress)
    else:
        path = settings["corpus"]
    manifest = Manifest(path)
    if not len(manifest.numbers("train")):
        raise ValueError(f"{path} has no training utterance" + (
            f": {manifest.rejects[0][0]}: {manifest.rejects[0][1]}" if manifest.rejects else ""))
    if number == 0:
        make_tokenizers(manifest, settings, folder)
    elif not os.path.exists(f"{folder}/text_tokenizer"):
        print("waiting for part 0 to make the tokenizers", flush=True)
        while not os.path.exists(f"{folder}/text_tokenizer"):
            time.sleep(1)
    names, jobs = {}, []
    for split in SPLITS:
        rows = manifest.numbers(split)
        size = min(max(-(-len(rows) // SHARDS), UTTERANCES[0]), UTTERANCES[1])
        n_shard = -(-len(rows) // size)
        names[split] = [f"{split}-{i:05d}-of-{n_shard:05d}" for i in range(n_shard)]
        for i, name in enumerate(names[split]):
            if i % parts == number and not has_shard(folder, name):
                jobs.append((folder, name, manifest.only(rows[i * size:(i + 1) * size]), settings))
    if jobs:
        make_shards(jobs, manifest.speakers, n_process, device)
    left = sum(not has_shard(folder, name) for split in names.values() for name in split)
    if left:
        print(f"part {number} is done; {left} shards are others'")
        return folder
    return finish(folder, settings, names, manifest)


def parse_part(part):
    """"3/16" -> (3, 16); "" -> torchrun's rank and world, if that runs us, else (0, 1)."""
    if not part:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    number, _, parts = part.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise ValueError(f"--part is NUMBER/PARTS, counted from 0, for instance 0/16; not {part!r}")
    return int(number), int(parts)


def finish(folder, settings, names, manifest):
    """Sum up the shards in dataset.json, list the rejects, and say what there is."""
    tokenizer = Tokenizer.load(f"{folder}/audio_tokenizer")
    text_tokenizer = TextTokenizer.load(f"{folder}/text_tokenizer")
    counts, n_reject, first = {}, len(manifest.rejects), manifest.rejects[:1]
    listed = f"{folder}/rejects.tsv"
    with open(beside(listed), "w", encoding="utf-8") as f:
        f.writelines(f"{name}\t{reason}\n" for name, reason in manifest.rejects)
        for split, shards in names.items():
            n, frames, tokens = 0, 0, 0
            for shard in shards:
                with open(f"{folder}/{shard}.json") as file:
                    meta = json.load(file)
                f.writelines(f"{name}\t{reason}\n" for name, reason in meta["rejects"])
                n_reject, first = n_reject + len(meta["rejects"]), first or meta["rejects"][:1]
                n, frames = n + meta["utterances"], frames + meta["frames"]
                tokens += len(np.load(f"{folder}/{shard}.text.npy", mmap_mode="r"))
            hours = frames / tokenizer.frame_hz / 3600
            counts[split] = {"shards": shards, "utterances": n, "hours": hours, "text_tokens": tokens}
            print(f"{split}: {n} utterances, {hours:.2f} hours, {tokens} text tokens")
    os.replace(beside(listed), listed)
    if not counts["train"]["utterances"]:
        raise ValueError(f"no training utterance is usable: {first[0][1]} (and {n_reject - 1} more rejects)")
    print(f"{len(manifest.speakers)} speakers, {text_tokenizer.n_text} text tokens; {n_reject} rejects"
          + (f", listed in {folder}/rejects.tsv" if n_reject else ""))
    sizes = {"n_semantic": tokenizer.n_semantic, "n_acoustic": tokenizer.n_acoustic,
             "n_level": tokenizer.n_level, "n_text": text_tokenizer.n_text}
    about = {"version": VERSION, "settings": settings, "sizes": sizes, "frame_hz": tokenizer.frame_hz,
             "splits": counts, "rejects": n_reject, "speakers": manifest.speakers}
    write_file(f"{folder}/README.md", card(about))
    write_file(f"{folder}/dataset.json", json.dumps(about, indent=1))
    return folder


def parse_settings(arguments):
    """['--name=value', ...] -> (settings, options of `prepare`)."""
    settings, options = dict(SETTINGS), {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in ("data_dir", "part", "device"):
            options["root" if name == "data_dir" else name] = value
        elif name not in SETTINGS or not argument.startswith("--"):
            raise ValueError(f"unknown setting {argument!r}; there are: {', '.join(SETTINGS)}, data_dir, "
                             "part, device")
        else:
            try:
                kind = type(SETTINGS[name])
                settings[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
            except (ValueError, KeyError):
                raise ValueError(f"{name} takes {type(SETTINGS[name]).__name__}, not {value!r}") from None
    return settings, options


def main(arguments):
    chosen, wishes = parse_settings(arguments)
    print(prepare(chosen, **wishes))


if __name__ == "__main__":
    run_script(main)
