"""Spoken numbers: the corpus that any machine makes by itself, our Shakespeare-char.

A helper of prepare.py, which calls `make_corpus`. The voices are espeak-ng's, from the PyPI wheel
`espeakng-loader`: a formant synthesizer, so nothing is downloaded and an hour of speech takes seconds.
Two kinds of phrases: digit strings ("seven three five") and cardinals ("two hundred and six").
"""
import csv
import ctypes
import os
import subprocess
import sys
import zlib

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16000

# Voice variants that Whisper-base reads without error; the held-out ones are never heard in training.
VARIANTS = ("Annie AnxiousAndy Gene Mario Michael Reed adam antonio belinda benjamin ed edward f1 f2 f3 f5 "
            "grandma grandpa klatt klatt2 klatt3 klatt5 klatt6 linda m2 m3 m4 m6 m7 m8 max michel robert "
            "steph2 victor zac").split()
HELD_OUT = "f4 m5 klatt4 Mike anika david steph3 paul".split()
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc")
N_TRAIN_SPEAKER = 48
UTTERANCES_PER_SHARD = 500


def speakers():
    """{name: (espeak voice, pitch 0-99, words per minute)} of the 48 training and the 8 held-out speakers."""
    table = {}
    for i in range(N_TRAIN_SPEAKER):    # 36 variants; the first 12 come twice: another accent, pitch and rate
        voice = f"{ACCENTS[(i + i // len(VARIANTS)) % 4]}+{VARIANTS[i % len(VARIANTS)]}"
        table[f"train{i:02d}"] = (voice, 35 + 7 * i % 31, 150 + 11 * i % 41)
    for i, variant in enumerate(HELD_OUT):
        table[f"new{i}"] = (f"{ACCENTS[i % 4]}+{variant}", 38 + 9 * i % 25, 155 + 13 * i % 31)
    return table


# ---- phrases -----------------------------------------------------------------------------------------------

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
        "sixteen seventeen eighteen nineteen").split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def cardinal(n):
    """0 <= n < 10000 in words: 206 -> 'two hundred and six'."""
    if n >= 1000:
        rest = n % 1000
        return f"{ONES[n // 1000]} thousand" + (
            f" {'and ' if rest < 100 else ''}{cardinal(rest)}" if rest else "")
    if n >= 100:
        return f"{ONES[n // 100]} hundred" + (f" and {cardinal(n % 100)}" if n % 100 else "")
    if n >= 20:
        return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")
    return ONES[n]


def digits(string):
    """'735' -> 'seven three five'."""
    return " ".join(ONES[int(c)] for c in string)


def is_evaluation_text(text):
    """One long phrase in eight is for evaluation alone: apart from training by construction, for any seed."""
    return len(text.split()) >= 3 and zlib.crc32(text.encode()) % 8 == 0


def draw_phrase(rng, evaluation):
    """A phrase of its side of the split. Evaluation: strings of 3 to 7 digits or cardinals below 10,000,
    evenly. Training also has short ones (1 and 2 digits, small cardinals): on them the words are learned."""
    while True:
        if rng.random() < 0.5:
            n_digit = rng.integers(3, 8) if evaluation else rng.integers(1, 8)
            text = digits("".join(str(rng.integers(10)) for _ in range(n_digit)))
        else:
            n_digit = 4 if evaluation else rng.choice(4, p=[0.1, 0.2, 0.3, 0.4]) + 1
            text = cardinal(int(rng.integers(10 ** n_digit)))
        if is_evaluation_text(text) == evaluation:
            return text


# ---- espeak-ng ---------------------------------------------------------------------------------------------

class Espeak:
    """espeak-ng through ctypes: `speak(text, voice, pitch, rate)` -> mono float32 at 22,050 Hz."""
    RETRIEVAL, RATE, PITCH, UTF8 = 2, 1, 3, 1       # enum values of espeak-ng's speak_lib.h

    def __init__(self):
        import espeakng_loader
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        # The data path is passed as espeak-ng wants it: the folder that holds espeak-ng-data.
        path = os.path.dirname(espeakng_loader.get_data_path()).encode()
        self.sr = self.lib.espeak_Initialize(self.RETRIEVAL, 0, path, 0)
        if self.sr <= 0:
            raise RuntimeError("espeak-ng did not start: pip install --force-reinstall espeakng-loader")
        self.chunks = []

        def collect(samples, n, events):
            if samples and n > 0:
                self.chunks.append(np.ctypeslib.as_array(samples, (n,)).copy())
            return 0                                # 0 = go on

        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int,
                                    ctypes.c_void_p)
        self.callback = callback(collect)           # kept: ctypes does not hold a reference
        self.lib.espeak_SetSynthCallback(self.callback)

    def speak(self, text, voice, pitch, rate):
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.lib.espeak_SetParameter(self.PITCH, pitch, 0)
        self.lib.espeak_SetParameter(self.RATE, rate, 0)
        self.chunks.clear()
        data = text.encode() + b"\0"
        if self.lib.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, self.UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng could not speak {text!r}")
        self.lib.espeak_Synchronize()
        return np.concatenate(self.chunks).astype(np.float32) / 32768


def trim_and_level(wav, sr, margin_s=0.06, rms=0.08):
    """Cut the silence at both ends to a margin and set the RMS level: (n,) -> (m,), in [-1, 1]."""
    loud = np.flatnonzero(np.abs(wav) > 0.01 * np.abs(wav).max())
    margin = int(margin_s * sr)
    wav = wav[max(loud[0] - margin, 0):loud[-1] + margin]
    return np.clip(wav * rms / np.sqrt(np.mean(wav ** 2)), -1, 1)


# ---- corpus ------------------------------------------------------------------------------------------------

def plan_corpus(n_utterance, n_eval, seed):
    """All utterances (id, text, speaker, split): train, seen (new texts), unseen (new texts, new voices)."""
    rng = np.random.default_rng(seed)
    names = list(speakers())
    train_names, new_names = names[:N_TRAIN_SPEAKER], names[N_TRAIN_SPEAKER:]
    plan = [(f"train{i:06d}", draw_phrase(rng, False), train_names[i % N_TRAIN_SPEAKER], "train")
            for i in range(n_utterance)]
    for split, voices in (("seen", train_names), ("unseen", new_names)):
        plan += [(f"{split}{i:04d}", draw_phrase(rng, True), voices[i % len(voices)], split)
                 for i in range(n_eval)]
    return plan


def synthesise_shard(folder, shard, n_utterance, n_eval, seed):
    """Speak one shard of the plan into folder/wav and write its manifest part, last, under its final name.

    espeak-ng keeps state between calls: only the same sequence of calls in a fresh process gives the same
    samples. So a shard is always a process of its own, and an interrupted one is spoken again from its start.
    """
    espeak, table = Espeak(), speakers()
    start = shard * UTTERANCES_PER_SHARD
    plan = plan_corpus(n_utterance, n_eval, seed)[start:start + UTTERANCES_PER_SHARD]
    os.makedirs(f"{folder}/wav/{shard:03d}", exist_ok=True)
    rows = []
    for name, text, speaker, split in plan:
        voice, pitch, rate = table[speaker]
        mood = np.random.default_rng(zlib.crc32(name.encode()))     # nobody speaks twice in just the same way
        pitch, rate = pitch + int(mood.integers(-6, 7)), rate + int(mood.integers(-12, 13))
        wav = soxr.resample(espeak.speak(text, voice, pitch, rate), espeak.sr, SAMPLE_RATE)
        path = f"wav/{shard:03d}/{name}.wav"
        soundfile.write(f"{folder}/{path}", trim_and_level(wav, SAMPLE_RATE), SAMPLE_RATE, subtype="PCM_16")
        rows.append((name, path, text, speaker, split))
    part = f"{folder}/part{shard:03d}.tsv"
    with open(part + ".tmp", "w", newline="") as f:
        csv.writer(f, delimiter="\t", lineterminator="\n").writerows(rows)
    os.replace(part + ".tmp", part)


def make_corpus(folder, n_utterance, n_eval, seed, n_process, progress):
    """Speak the whole corpus: folder/wav/*/*.wav and folder/manifest.tsv (id, audio, text, speaker, split).

    Resumes at the first missing shard. progress: called with (done, total) shards. Returns the manifest path.
    """
    os.makedirs(folder, exist_ok=True)
    total = -(-(n_utterance + 2 * n_eval) // UTTERANCES_PER_SHARD)
    parts = [f"{folder}/part{i:03d}.tsv" for i in range(total)]
    waiting = [i for i in range(total) if not os.path.exists(parts[i])]
    running = {}
    while waiting or running:
        while waiting and len(running) < n_process:
            i = waiting.pop(0)
            code = ("import spoken_numbers as s; "
                    f"s.synthesise_shard({folder!r}, {i}, {n_utterance}, {n_eval}, {seed})")
            here = os.path.dirname(os.path.abspath(__file__))
            running[i] = subprocess.Popen([sys.executable, "-c", code], cwd=os.getcwd(),
                                          env={**os.environ, "PYTHONPATH": here})
        i, process = next(iter(running.items()))
        if process.wait() != 0:
            raise RuntimeError(f"speaking shard {i} failed with exit code {process.returncode}; "
                               "its error is above")
        del running[i]
        progress(total - len(waiting) - len(running), total)
    with open(f"{folder}/manifest.tmp", "w") as out:
        out.write("id\taudio\ttext\tspeaker\tsplit\n")
        for part in parts:
            with open(part) as f:
                out.write(f.read())
    os.replace(f"{folder}/manifest.tmp", f"{folder}/manifest.tsv")
    return f"{folder}/manifest.tsv"
