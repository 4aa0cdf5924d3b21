"""Sample: recognise, speak, continue.

Fifteenth file of the reading order.
  python sample.py out/numbers asr a.wav b.wav                                   one transcript a line
  ls *.wav | python sample.py out/numbers asr - --beam=4 --json                  files from stdin
  python sample.py out/numbers tts "seven three five" --prompt voice.wav --best=5 --out x.wav
  python sample.py out/numbers tts - --prompt voice.wav --out folder < lines     a wav for each, and a list
  python sample.py out/numbers continue a.wav --out x.wav                        or more files, into a folder
  python sample.py out/numbers text "seven three"
  python sample.py export out/numbers folder                 model, configuration and tokenizers, for others
  python sample.py export out/numbers folder --text-only     a plain text LLM, for `transformers`
On a CPU, --quant=int8 decodes faster at a small loss of precision; tts --stream writes while it speaks.
"""
import argparse
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext

import soundfile
import torch

from checkpoint import save_model
from config import check_sampling
from convert import export_text
from explain import explain
from script import run_script
from speaker import Speaker
from tokenize_audio import Tokenizer, load_audio, save_audio
from wer import open_whisper

FILES = 16                  # recognised at once
CUT = "cut at its limit, no end came"


def export(run, folder, text_only=False):
    """Write a folder to hand on: all of the model and its tokenizers, which sample.py and eval.py read again;
    or, text_only, the LLM that is left without speech, in Hugging Face's form."""
    if os.path.exists(folder):
        raise ValueError(f"{folder} is there already: name a new folder")
    speaker, beside = Speaker(run, dtype="float32"), folder.rstrip("/") + ".tmp"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    if text_only:
        bias = export_text(speaker.model, beside)
        for name, content in speaker.text_tokenizer.files.items():
            if name != "config.json":
                with open(f"{beside}/{name}", "wb") as f:
                    f.write(content)
        if bias:
            print(f"left out: the head_emb of stream 0, which moves a logit by up to {bias:.3g}")
    else:
        own = ("vocab", "data", "files")
        state = {name: value for name, value in speaker.state.items() if name not in own}
        save_model(beside, speaker.config, speaker.vocab, speaker.model, state)
        speaker.text_tokenizer.save(f"{beside}/text_tokenizer")
        if speaker.tokenizer:
            speaker.tokenizer.save(f"{beside}/audio_tokenizer", whole=True)
    os.rename(beside, folder.rstrip("/"))
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")


def write_stream(path, pieces):
    """Write wav pieces as they come, `-`: as bare 16-bit samples to stdout; says how long the first took, and
    how it ended, which `pieces` returns."""
    began, first, n, rate = time.time(), None, 0, Tokenizer.sample_rate
    bare = path == "-"
    if not bare:
        save_audio(path, torch.zeros(1).numpy())        # where it can't be written is said before it speaks
    with nullcontext(sys.stdout.buffer) if bare else soundfile.SoundFile(path, "w", rate, 1) as out:
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                ended = end.value
                break
            first = first or time.time() - began
            out.write((32767 * piece.clip(-1, 1)).astype("<i2").tobytes() if bare else piece)
            out.flush()
            n += len(piece)
    print(f"{path}: {n / rate:.2f} s of sound in {time.time() - began:.2f} s, the first after {first:.2f} s; "
          + ("ended by itself" if ended else CUT),
          file=sys.stderr if bare else sys.stdout)


def main(arguments):
    if arguments[:1] == ["export"]:
        parser = argparse.ArgumentParser(prog="sample.py export", description=export.__doc__)
        parser.add_argument("run", help="folder of a run, of a checkpoint, or of a published OpusLM")
        parser.add_argument("folder", help="a new folder")
        parser.add_argument("--text-only", action="store_true", help="a plain LLM for `transformers`")
        args = parser.parse_args(arguments[1:])
        return export(args.run, args.folder, args.text_only)
    about, examples = __doc__.split("\n")[0], __doc__.split("reading order.")[1]
    parser = argparse.ArgumentParser(description=about, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run or of a checkpoint")
    parser.add_argument("task", choices=["asr", "tts", "continue", "text"])
    parser.add_argument("input", nargs="+", help="audio files, or the text; - reads lines from stdin")
    parser.add_argument("--prompt", help="tts: a recording of the voice to speak in, a second or more")
    parser.add_argument("--out", help="tts, continue: the wav (out.wav), or of several the folder (samples)")
    parser.add_argument("--temperature", type=float, help="of text and semantic tokens (default: the run's)")
    parser.add_argument("--acoustic_temperature", type=float, help="of the acoustic tokens")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--guidance", type=float, help="tts: over 1 follows text and voice more closely")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quant", default="", help="int8: faster decoding on a CPU")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--beam", type=int, default=1, help="asr: keep so many hypotheses (1: greedy)")
    parser.add_argument("--best", type=int, default=1, help="tts: of so many samples the best, by own ASR")
    parser.add_argument("--whisper", help="tts --best: by this Whisper's ear instead, see wer.py")
    parser.add_argument("--json", action="store_true", help="a line of json for each")
    parser.add_argument("--explain", metavar="PAGE", help="asr, tts: look inside, see explain.py")
    parser.add_argument("--head", help="LAYER,HEAD whose attention that page shows (default: the best)")
    parser.add_argument("--stream", action="store_true", help="tts: write while it speaks; --out - to stdout")
    args = parser.parse_args(arguments)
    if args.stream and (args.task != "tts" or args.best > 1 or args.whisper or args.json):
        raise ValueError("--stream is for tts, and writes what it says at once: without --best, --whisper, "
                         "--json")
    speaker = Speaker(args.run, quant=args.quant, dtype=args.dtype)
    for name in ("temperature", "acoustic_temperature", "top_k", "top_p", "guidance"):
        if getattr(args, name) is not None:
            setattr(speaker.config, name, getattr(args, name))
    check_sampling(speaker.config)
    generator = torch.Generator().manual_seed(args.seed)
    read = lambda path: speaker.encode(load_audio(path))
    from_stdin = args.input == ["-"]
    several = not args.stream and (from_stdin or args.task == "continue" and len(args.input) > 1)
    args.out = args.out or ("samples" if several else "out.wav")
    if args.explain:
        return explain(speaker, args, generator)
    lines = [line.strip() for line in sys.stdin if line.strip()] if from_stdin else args.input
    if args.task == "asr":
        return transcribe_files(speaker, lines, args)
    if args.task == "continue":
        return say_all(speaker, lines, several, args,
                       lambda path: continue_file(speaker, read(path), generator))
    texts = lines if from_stdin else [" ".join(lines)]
    if args.task == "text":
        for text in texts:
            text, ended = speaker.continue_text(text, generator=generator)
            print(json.dumps({"text": text, "ended": ended}, ensure_ascii=False) if args.json else text,
                  flush=True)
            if not ended:
                print(f"sample.py: {CUT}", file=sys.stderr, flush=True)
        return None
    prompt = read(args.prompt) if args.prompt else None
    if args.stream:
        return write_stream(args.out, speaker.synthesise_stream(texts, prompt, generator))
    whisper, missing = open_whisper(args.whisper) if args.whisper else (None, None)
    if missing:
        raise ValueError(missing)
    return say_all(speaker, texts, several, args,
                   lambda text: speaker.speak(text, prompt, args.best, generator, whisper))


def transcribe_files(speaker, paths, args):
    """Print a line for each file, FILES of them read at once; where one can't be read, an empty line."""
    code = 0
    for some in (paths[k:k + FILES] for k in range(0, len(paths), FILES)):
        wavs, errors = {}, {}
        for path in some:
            try:
                wavs[path] = load_audio(path)
            except ValueError as problem:
                errors[path], code = {"error": str(problem)}, 2
                print(f"sample.py: {problem}", file=sys.stderr, flush=True)
        texts = dict(zip(wavs, speaker.transcribe_wavs(list(wavs.values()), args.beam)))
        for path in some:
            line = {"audio": path} | (errors.get(path) or dict(zip(("text", "ended"), texts[path])))
            if not line.get("ended", True):
                print(f"sample.py: {path}: {CUT}", file=sys.stderr, flush=True)
            print(json.dumps(line, ensure_ascii=False) if args.json else line.get("text", ""), flush=True)
    return code


def continue_file(speaker, codes, generator):
    """codes (T, N) -> wav (m,) of them and what follows, and about it."""
    new, ended = speaker.continue_speech(codes, generator)
    return speaker.decode(torch.cat([torch.from_numpy(codes), new])), {"ended": ended}


def say_all(speaker, inputs, several, args, say):
    """say(input) -> (wav (n,), about) for each: into the wav args.out, or, `several`, into that folder, with
    samples.jsonl about each."""
    out = args.out
    if several and os.path.splitext(out)[1]:
        raise ValueError(f"--out={out} is one wav, for several: name a folder")
    for number, given in enumerate(inputs):
        path = f"{out}/{number:04d}.wav" if several else out
        wav, about = say(given)
        save_audio(path, wav)
        about |= {"wav": path, "text" if args.task == "tts" else "audio": given, "prompt": args.prompt,
                  "seconds": len(wav) / Tokenizer.sample_rate}
        line = json.dumps(about, ensure_ascii=False)
        if several:
            with open(f"{out}/samples.jsonl", "a" if number else "w", encoding="utf-8") as f:
                f.write(line + "\n")
        ended = "ended by itself" if about["ended"] else f"{CUT} (at most {speaker.config.max_speech_s:g} s)"
        if about.get("wrong") is not None:
            whose = "Whisper's" if args.whisper else "its own"
            ended += f"; {100 * about['wrong']:.0f} % wrong by {whose} ear"
        print(line if args.json else f"{path}: {about['seconds']:.2f} s, {ended}", flush=True)


if __name__ == "__main__":
    run_script(main)
