"""Judge: what an audio tokenizer keeps, in sound and in words.

Helper, outside the reading order:
  python judge.py sound TOKENIZER manifest.tsv --whisper=whisper-base --n=40
      tokenizes and decodes evaluation utterances: WER by Whisper of the originals and of what comes back,
      and of the difference, with 95 % intervals, no utterance counted as more than all wrong (with --whisper;
      pip install -e '.[eval]'), PESQ and STOI (where pesq and pystoi are installed), speed
  python judge.py words DATA [OTHER_DATA ...]
      do semantic tokens tell words apart, whoever speaks them? X and A are one word by two speakers, B is
      another word by A's: how often is X nearer to B (edit distance of the tokens)? 50 % is chance. Where
      words are comes from the first folder's align.npz (align.py); the others hold the same utterances.
  python judge.py cost facebook/hubert-base-ls960 descript/dac_16khz models/lyra out/numbers/audio_tokenizer
      how fast are encoders, codecs and tokenizers on one core, and what would 213,000 hours of speech cost,
      OpusLM's, by the FLOPs of their matrix products and convolutions on an H100 in fp32 at 40 % of its peak?
"""
import argparse
import os
import time

import numpy as np
import soxr
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from corpora import Manifest
from data import Dataset
from interleave import changes
from prepare import read_utterance
from pretrained import Lyra, NeuralCodec, SpeechEncoder
from script import run_script
from tokenize_audio import SAMPLE_RATE, Tokenizer
from wer import comparable, edit_distance, interval, open_whisper, word_errors

SECONDS, HOURS = 12.6, 213_000      # of an utterance, LibriSpeech's mean; of speech in arXiv 2506.17611
H100 = 0.4 * 67e12                  # FLOP a second in fp32


def judge_sound(tokenizer, wavs, texts, whisper=None):
    """wavs [(n,)] at 16 kHz and what is said in them -> {measure: number, or (number, low, high)}; measures
    without their package are left out."""
    seconds, codes, began = sum(map(len, wavs)) / SAMPLE_RATE, [], time.perf_counter()
    for wav in wavs:
        codes.append(tokenizer.encode(wav))
    encoded = time.perf_counter()
    copies = [tokenizer.decode(code) for code in codes]
    result = {"seconds": seconds, "encoding, times real time": seconds / (encoded - began),
              "decoding, times real time": seconds / (time.perf_counter() - encoded)}
    pairs = [(wav[:len(copy)], copy[:len(wav)]) for wav, copy in zip(wavs, copies)]
    try:
        from pesq import pesq
        result["PESQ, wide band"] = interval([pesq(SAMPLE_RATE, *pair, "wb") for pair in pairs])
    except ImportError:
        print("no PESQ: pip install pesq")
    try:
        from pystoi import stoi
        result["STOI"] = interval([stoi(*pair, SAMPLE_RATE) for pair in pairs])
    except ImportError:
        print("no STOI: pip install pystoi")
    if whisper:
        errors = []
        for name, group in (("WER of the originals, %", wavs), ("WER after decoding, %", copies)):
            heard = [comparable(text, whisper.hear(wav)) for text, wav in zip(texts, group)]
            found, words = word_errors(*zip(*heard), cap=True)
            errors.append(100 * found)
            result[name] = interval(errors[-1], words)
        result["WER, lost by it, points"] = interval(errors[1] - errors[0], words)
    return result


def merged(tokens):
    """Tokens (T,) without repetitions of the one before, as a list."""
    return tokens[changes(tokens).numpy()].tolist()


def judge_words(folders, n=3000, letters=4, seed=0):
    """-> [% of n triples (X, A, B) in which a folder's tokens put X nearer to the wrong word, low, high],
    half a triple where both are as near; low to high: the 95 % interval over triples. The same triples for
    each folder; words of at least so many letters."""
    datasets, rng = [Dataset(folder, "train") for folder in folders], np.random.default_rng(seed)
    first = datasets[0]
    for dataset in datasets[1:]:
        if dataset.info["id"] != first.info["id"]:
            raise ValueError(f"{dataset.folder} and {first.folder} do not hold the same utterances")
    if not os.path.exists(f"{first.folder}/align.npz"):
        raise ValueError(f"{first.folder} has no align.npz: run align.py {first.folder} first")
    places, by_word, by_speaker = np.load(f"{first.folder}/align.npz")["words"].tolist(), {}, {}
    texts = [text.lower().split() for text in first.info["text"]]
    for k, (i, number, _, _) in enumerate(places):
        if len(texts[i][number]) >= letters:
            by_word.setdefault(texts[i][number], []).append(k)
            by_speaker.setdefault(first.info["speaker"][i], []).append(k)
    speaker = lambda k: first.info["speaker"][places[k][0]]
    word = lambda k: texts[places[k][0]][places[k][1]]
    says_more = {name for name, spoken in by_speaker.items() if len(set(map(word, spoken))) > 1}
    common = [group for group in by_word.values() if len({speaker(k) for k in group}) > 1
              and says_more & {speaker(k) for k in group}]
    triples = []
    if not common:
        raise ValueError(f"{first.folder}: no word is said by two speakers, one of whom says another too")
    while len(triples) < n:
        x, a = rng.choice(common[rng.integers(len(common))], 2)
        b = rng.choice(by_speaker[speaker(a)])
        if speaker(x) != speaker(a) and word(b) != word(a):
            triples.append((x, a, b))

    def wrong(dataset):
        def piece(k):
            i, _, start, end = places[k]
            return merged(dataset[i][0][start:end, 0])

        found = []
        for triple in triples:
            x, a, b = map(piece, triple)
            right, other = (edit_distance(x, y) / max(len(x), len(y), 1) for y in (a, b))
            found.append(100 * ((other < right) + 0.5 * (other == right)))
        return interval(found)

    return [wrong(dataset) for dataset in datasets]


def directions(name):
    """A network or tokenizer -> {"encoding": function of a wav at 16 kHz, "decoding": function of what that
    returns}, what it has of them."""
    if os.path.isfile(f"{name}/soundstream_encoder.tflite"):
        lyra = Lyra(name)
        return {"encoding": lyra.features, "decoding": lyra.sound}
    if os.path.isfile(f"{name}/audio_tokenizer.json"):
        tokenizer = Tokenizer.load(name)
        return {"encoding": tokenizer.encode, "decoding": tokenizer.decode}
    try:
        return {"encoding": SpeechEncoder(name).features}
    except ValueError:
        codec = NeuralCodec(name, frame_hz=None)
        return {"encoding": lambda wav: codec.codes(soxr.resample(wav, SAMPLE_RATE, codec.rate)),
                "decoding": codec.sound}


def cost(name, turns=3):
    """-> [(direction, times real time on one core, FLOP of SECONDS of speech)]; 0 where torch does not do it,
    and of what it does products and convolutions alone."""
    rng, rows = np.random.default_rng(0), []
    given = rng.normal(0, 0.05, int(SECONDS * SAMPLE_RATE)).astype(np.float32)
    for direction, work in directions(name).items():
        times, made = [], work(given)
        for _ in range(turns):
            began = time.process_time()
            work(given)
            times.append(time.process_time() - began)
        counter = FlopCounterMode(display=False)        # knows the plain form of attention
        with counter, sdpa_kernel(SDPBackend.MATH):
            work(given)
        rows.append((direction, SECONDS / min(times), counter.get_total_flops()))
        given = made
    return rows


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    sound = commands.add_parser("sound")
    sound.add_argument("tokenizer", help="folder of a tokenizer")
    sound.add_argument("manifest")
    sound.add_argument("--whisper", help="hub id or folder of a Whisper model, see wer.py")
    sound.add_argument("--n", type=int, default=40, help="utterances of unseen speakers, or else any")
    words = commands.add_parser("words")
    words.add_argument("data", nargs="+", help="prepared folders")
    words.add_argument("--n", type=int, default=3000, help="triples")
    costs = commands.add_parser("cost")
    costs.add_argument("network", nargs="+", help="folders, or hub ids, of encoders, codecs, tokenizers")
    args = parser.parse_args(arguments)
    if args.what == "words":
        for folder, (error, low, high) in zip(args.data, judge_words(args.data, args.n)):
            print(f"{folder}: {error:.1f} % ({low:.1f} to {high:.1f}) of {args.n} choices between two words "
                  "are wrong")
        return
    if args.what == "cost":
        torch.set_num_threads(1)
        for name in args.network:
            for direction, speed, flops in cost(name):
                gpu = flops * HOURS / SECONDS / H100
                core = HOURS / speed
                print(f"{name}: {direction} {speed:.1f} times real time, {core:,.0f} core-hours in all" + (
                      f"; {flops / 1e9:.0f} GFLOP an utterance, {gpu:,.0f} H100-hours" if flops else ""))
        return
    manifest, wavs, texts = Manifest(args.manifest), [], []
    numbers = manifest.numbers("unseen")
    numbers = numbers if len(numbers) else np.arange(len(manifest.split))
    for row in manifest.rows(np.random.default_rng(0).permutation(numbers)):
        if row["audio"] and row["text"] and len(wavs) < args.n:
            wavs.append(read_utterance(row, 30.0))
            texts.append(row["text"])
    if not wavs:
        raise ValueError(f"{args.manifest} has no utterance with audio and text")
    torch.set_num_threads(os.cpu_count())
    whisper, missing = open_whisper(args.whisper) if args.whisper else (None, None)
    for name, value in judge_sound(Tokenizer.load(args.tokenizer), wavs, texts, whisper).items():
        print(f"{name:28s} " + ("{:8.3f} ({:.3f} to {:.3f})".format(*value) if isinstance(value, tuple)
                                else f"{value:8.3f}"))
    if missing:
        print(f"WER by Whisper: not available: {missing}")
    return 3 if missing else 0


if __name__ == "__main__":
    run_script(main)
