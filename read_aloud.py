"""Read aloud: synthetic voices read texts that nobody recorded. Helper of prepare.py, for small corpora.

  python read_aloud.py my/aloud austen.txt moby.txt --hours=5      my/aloud/wav/*.flac, my/aloud/manifest.tsv
  python read_aloud.py my/one austen.txt --voice=hibari            one voice as it is, to learn synthesis from
Programs that speak English at a hundred times real time on one core, without a download of voices:
  hibari    pip install hibari-tts, one female voice
  flite     a package of Debian and others, three voices
Each is played faster or slower than it spoke, which moves pitch and formants together, as another size of
the throat would, and speaks so much slower or faster before. So four voices are some twenty speakers.
"""
import argparse
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

import numpy as np
import soundfile
from tqdm import tqdm

from corpora import SPLITS
from script import run_script
from shards import write_file
from tokenize_audio import to_mono_16k

PITCHES = {"hibari": (0.78, 0.84, 0.9, 1.0, 1.07), "rms": (0.94, 1.0, 1.08, 1.2),
           "awb": (0.94, 1.0, 1.08, 1.2), "slt": (0.8, 0.88, 0.94, 1.0, 1.06)}      # of each voice
PACE = (0.85, 1.2)          # times the voice's own
WORDS = (8, 75)             # of an utterance: 3 to 28 s
SPOKEN = {"Mr.": "Mister", "Mrs.": "Missus", "Dr.": "Doctor", "St.": "Saint", "&": "and", "--": ", ",
          "—": ", ", "’": "'", "“": '"', "”": '"', "_": ""}


def passages(text, rng, words=WORDS):
    """A book -> passages as they are read, whole sentences, so many words long. A sentence with anything but
    letters and punctuation in it ends a passage and is left out: who knows how "1814" or "Esq." is read?"""
    for short, spoken in SPOKEN.items():
        text = text.replace(short, spoken)
    passage, n, goal = [], 0, int(rng.integers(*words))
    for sentence in re.split(r"(?<=[.!?;])[\"')]*\s+", " ".join(text.split())):
        size = len(sentence.split())
        plain = re.fullmatch(r"[A-Za-z ,.;:!?'\"()-]+", sentence)
        plain = plain and not re.search(r"[A-Z]{2}|[A-Za-z]\.[A-Za-z]", sentence)        # NATO, e.g.
        if n and (not plain or n + size > words[1]):
            if n >= words[0]:
                yield " ".join(passage)
            passage, n, goal = [], 0, int(rng.integers(*words))
        if plain and size <= words[1]:
            passage, n = [*passage, sentence], n + size
            if n >= goal:
                yield " ".join(passage)
                passage, n, goal = [], 0, int(rng.integers(*words))


def transcript(passage):
    """What is read, in small letters, without punctuation but the apostrophes within words."""
    words = re.sub(r"[^a-z']+", " ", passage.lower()).split()
    return " ".join(word for word in (word.strip("'") for word in words) if word)


@cache
def hibari():
    from hibari import Hibari
    return Hibari()


def voices():
    """Names of the voices that this machine has."""
    found = ["rms", "awb", "slt"] if shutil.which("flite") else []
    try:
        hibari()
        found.append("hibari")
    except ImportError:
        pass
    if not found:
        raise ValueError("no voice here: pip install hibari-tts, or install your system's package flite")
    return found


def speak(passage, voice, pitch, pace, seed=0):
    """-> (n,) float32 at 16 kHz. pitch and pace: times the voice's own."""
    if voice == "hibari":
        return to_mono_16k(hibari()(passage, speed=pace / pitch, seed=seed), 24000 * pitch)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/spoken.wav"
        subprocess.run(["flite", "-voice", voice, "--setf", f"duration_stretch={pitch / pace}", "-t", passage,
                        "-o", path], check=True, capture_output=True)
        wav, rate = soundfile.read(path, dtype="float32")
    return to_mono_16k(wav, rate * pitch)


def read_passage(folder, passage, names, natural=False):
    """Speak a passage into a file of the folder -> name, speaker, seconds. What is said, by whom and how
    follow from the name, so that a file that is there already is what it should be. natural: voices keep
    their own pitch and pace."""
    digest = hashlib.sha256(f"{names} {'natural ' * natural}{passage}".encode()).hexdigest()[:12]
    rng, path = np.random.default_rng(int(digest, 16)), f"{folder}/{digest}.flac"
    voice, pitch, pace = names[rng.integers(len(names))], 1.0, 1.0
    if not natural:
        pitch, pace = PITCHES[voice][rng.integers(len(PITCHES[voice]))], rng.uniform(*PACE)
    if not os.path.exists(path):
        wav = speak(passage, voice, pitch, pace, seed=int(rng.integers(2 ** 31)))
        wav *= 0.06 / max(np.sqrt(np.mean(wav ** 2)), 1e-6)
        soundfile.write(path + ".tmp", np.clip(wav, -0.99, 0.99), 16000, format="FLAC")
        os.replace(path + ".tmp", path)
    return digest, f"{voice}-{pitch}", soundfile.info(path).duration


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="for the speech and its manifest")
    parser.add_argument("texts", nargs="+", help="books as plain text")
    parser.add_argument("--hours", type=float, default=5.0, help="of speech, about")
    parser.add_argument("--voice", choices=PITCHES, help="this one alone, at its own pitch and pace")
    parser.add_argument("--words", type=int, nargs=2, default=WORDS, metavar=("MIN", "MAX"),
                        help="of an utterance")
    parser.add_argument("--split", choices=SPLITS, default="train", help="of the manifest")
    args = parser.parse_args(arguments)
    names, rng, found = voices(), np.random.default_rng(0), []
    if args.voice and args.voice not in names:
        raise ValueError(f"no voice {args.voice} here: there are {', '.join(names)}; hibari comes with "
                         "pip install hibari-tts, the others with your system's package flite")
    if not 0 < args.words[0] < args.words[1]:
        raise ValueError("--words MIN MAX: at least 1, and MAX above MIN")
    names = [args.voice] if args.voice else names
    for path in args.texts:
        with open(path, encoding="utf-8") as f:
            found += passages(f.read(), rng, args.words)
    found = list(dict.fromkeys(found))          # each once
    if not found:
        raise ValueError(f"no passage of whole sentences and {args.words[0]} words in "
                         f"{', '.join(args.texts)}")
    os.makedirs(f"{args.folder}/wav", exist_ok=True)
    speak_one = partial(read_passage, f"{args.folder}/wav", names=names, natural=bool(args.voice))
    rows, seconds, waiting = [], 0.0, [found[k] for k in rng.permutation(len(found))]
    with ProcessPoolExecutor() as pool, tqdm(total=args.hours, unit="h") as bar:
        while waiting and seconds < 3600 * args.hours:
            some, waiting = waiting[:64], waiting[64:]
            for passage, (name, speaker, length) in zip(some, pool.map(speak_one, some)):
                rows.append((name, f"wav/{name}.flac", transcript(passage), speaker, args.split))
                seconds += length
            bar.update(seconds / 3600 - bar.n)
    header = ("id", "audio", "text", "speaker", "split")
    write_file(f"{args.folder}/manifest.tsv", "".join("\t".join(row) + "\n" for row in [header, *rows]))
    print(f"{args.folder}/manifest.tsv: {len(rows)} passages, {seconds / 3600:.1f} h, {len(names)} voices")


if __name__ == "__main__":
    run_script(main)
