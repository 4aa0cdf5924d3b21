"""Sample: recognise, speak, continue.

Fourteenth file of the reading order.
  python sample.py out/numbers asr a.wav b.wav                                   one transcript a line
  ls *.wav | python sample.py out/numbers asr - --beam=4 --json                  files from stdin
  python sample.py out/numbers tts "seven three five" --prompt voice.wav --best=5 --out x.wav
  python sample.py out/numbers tts - --prompt voice.wav --out folder < lines     a wav for each, and a list
  python sample.py out/numbers continue a.wav --out x.wav
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

import numpy as np
import soundfile
import torch

from checkpoint import load_model, save_model
from config import check_guidance
from convert import export_text, is_published
from data import prompt_frames
from decode import beam_search, generate, prepare_for_decoding, steps
from explain import explain
from interleave import SPEECH, TEXT, Vocab, generation_prefix, speech_codes, speech_frames, text_frames
from script import run_script
from tokenize_audio import Tokenizer, cut_wav, load_audio
from tokenize_text import TOKENIZER_FILES, TextTokenizer, find_folder
from wer import comparable, edit_distance, open_whisper

FRAMES_A_LETTER = 1, 12     # speech is not shorter (50 letters a second) nor longer (4, and a second more)
FILES = 16                  # recognised at once
PIECE_LETTERS = 200         # longer texts are spoken piece by piece


# ---- pieces ------------------------------------------------------------------------------------------------

def cut_text(text, letters=PIECE_LETTERS):
    """A long text -> pieces of at most so many letters, cut at ends of sentences, else commas, else words."""
    words, pieces = text.split(), []
    while words:
        n, size = 0, 0
        while n < len(words) and (n == 0 or size + len(words[n]) < letters):
            size, n = size + len(words[n]) + 1, n + 1
        if n < len(words):
            ends = [[k for k in range(1, n + 1) if words[k - 1][-1] in marks] for marks in (".!?", ",;:")]
            n = next((group[-1] for group in ends if group), n)
        pieces.append(" ".join(words[:n]))
        words = words[n:]
    return pieces


# ---- tasks -------------------------------------------------------------------------------------------------

class Speaker:
    """A trained model with its tokenizers: `transcribe`, `synthesise`, `continue_speech`, `continue_text`."""

    def __init__(self, run, device="cpu", quant="", dtype="auto"):
        self.model, self.config, self.vocab, self.state = load_model(run, device, dtype)
        prepare_for_decoding(self.model, quant)
        self.run, self.tokenizer = run, None
        if is_published(run):           # its text tokenizer is the base LLM's; audio tokenizers are elsewhere
            beside = os.path.exists(f"{run}/tokenizer.json")
            folder = run if beside else find_folder(self.config.init_from, TOKENIZER_FILES)
            self.text_tokenizer = TextTokenizer.load(folder)
            return
        if not os.path.isdir(f"{run}/text_tokenizer"):
            self.run = os.path.dirname(os.path.abspath(run))                # from a checkpoint's to its run's
        self.text_tokenizer = TextTokenizer.load(f"{self.run}/text_tokenizer")
        if os.path.isdir(f"{self.run}/audio_tokenizer"):
            self.tokenizer = t = Tokenizer.load(f"{self.run}/audio_tokenizer")
            whole = Vocab(t.n_semantic, t.n_acoustic, t.n_level, self.vocab.n_text)
            _, self.columns = whole.only(self.config.token_streams)

    def encode(self, wav):
        """wav (n,) at 16 kHz -> codes (T, N) of the streams that the model has."""
        if self.tokenizer is None:
            raise ValueError(f"{self.run} came without an audio tokenizer: it reads and writes text only")
        return self.tokenizer.encode(wav)[:, self.columns]

    def decode(self, codes):
        """codes (T, N) -> wav (n,) at 16 kHz."""
        return self.voice().decode(codes)

    def voice(self):
        """The audio tokenizer. ValueError if what the model says has no sound."""
        if self.tokenizer is None or self.config.token_streams == "semantic":
            raise ValueError(f"{self.run} has no acoustic tokens: what it says has no sound")
        return self.tokenizer

    def max_speech(self):
        return int(self.config.max_speech_s * Tokenizer.frame_hz)

    def text(self, frames):
        return self.text_tokenizer.decode((frames[:, 0] - self.vocab.text_start).tolist())

    def ids(self, text):
        if not text.strip():
            raise ValueError("the text is empty")
        return text_frames(self.vocab, self.text_tokenizer.encode(text))

    def recognise(self, codes, batch=50, beam=1):
        """Greedy or by a beam: [codes (T, N)] -> [(text, of at most T / 4 + 8 tokens, ended)]."""
        order, read = sorted(range(len(codes)), key=lambda i: len(codes[i])), [None] * len(codes)
        for start in range(0, len(order), batch):
            part = order[start:start + batch]
            speech = [speech_frames(self.vocab, codes[i], self.config.semantic_asr) for i in part]
            prefixes = [generation_prefix(self.vocab, "asr", {"speech": frames}) for frames in speech]
            limits = [len(codes[i]) // 4 + 8 for i in part]
            if beam > 1:
                found = [beam_search(self.model, self.vocab, prefix, TEXT, limit, beam)
                         for prefix, limit in zip(prefixes, limits)]
            else:
                found = generate(self.model, self.vocab, prefixes, TEXT, limits)
            for i, (frames, ended) in zip(part, found):
                read[i] = self.text(frames), ended
        return read

    def transcribe(self, codes, **options):
        """[codes (T, N)] -> [text], as `recognise`."""
        return [text for text, _ in self.recognise(codes, **options)]

    def transcribe_wavs(self, wavs, beam=1):
        """Speech [(n,)] at 16 kHz, of any length, in pieces as training's longest -> [(text, ended)]."""
        cut = [cut_wav(wav, self.config.max_audio_s) for wav in wavs]
        codes = [self.encode(piece) for pieces in cut for piece in pieces]
        read = iter(self.recognise(codes, beam=beam))
        whole = [[next(read) for _ in pieces] for pieces in cut]
        return [(" ".join(text for text, _ in parts), all(ended for _, ended in parts)) for parts in whole]

    def speech_options(self, generator, texts=None):
        """What `decode.steps` takes for speech: limits (of given texts, by their letters), temperatures,
        random numbers, guidance (away from what it would say of itself)."""
        c, longest, shortest, unguided = self.config, self.max_speech(), 1, None
        if texts:
            low, high = FRAMES_A_LETTER
            shortest = [max(3, min(longest, low * len(text))) for text in texts]
            longest = [min(longest, high * len(text) + int(Tokenizer.frame_hz)) for text in texts]
            check_guidance(c)
            unguided = generation_prefix(self.vocab, "speech", {})
        return (SPEECH, longest, shortest, c.temperature, c.acoustic_temperature, c.top_k, generator, c.top_p,
                unguided, c.guidance if texts else 1.0)

    def tts_prefix(self, text, prompt):
        """text, prompt codes (T, N) or None -> the aligned frames (T, N) that speech follows."""
        entries, c = {"text": self.ids(text)}, self.config
        task = "plain_tts" if prompt is None else "tts"
        if not c.mixture.get(task):
            raise ValueError("this model has not learned to speak " + (
                "without a voice prompt (task plain_tts): give one, --prompt voice.wav" if prompt is None else
                "in a voice that it is given (task tts): leave the voice prompt away"))
        if task == "tts":
            entries["prompt"] = prompt_frames(self.vocab, prompt[:c.prompt_len], c.prompt_len)
        return generation_prefix(self.vocab, task, entries)

    def synthesise(self, texts, prompts, generator=None, batch=50):
        """Speech synthesis: [text] and voice prompts [codes (T, N) or None] -> [(codes (L, N), ended)]."""
        results, prefixes = [], [self.tts_prefix(text, prompt) for text, prompt in zip(texts, prompts)]
        for start in range(0, len(texts), batch):
            part = slice(start, start + batch)
            results += generate(self.model, self.vocab, prefixes[part],
                                *self.speech_options(generator, texts[part]))
        return [(speech_codes(self.vocab, frames), ended) for frames, ended in results]

    def synthesise_best(self, texts, prompts, n, generator=None, whisper=None):
        """The best of n samples of each text: which the model itself, or a wer.Whisper, reads with the fewest
        wrong words, and of those one that ended -> [(codes, ended)], as `synthesise`, and the share of wrong
        words."""
        samples = self.synthesise([text for text in texts for _ in range(n)],
                                  [prompt for prompt in prompts for _ in range(n)], generator)
        if n == 1:
            return samples, None
        if whisper:
            heard = [whisper.hear(self.decode(codes)) for codes, _ in samples]
        else:
            heard = self.transcribe([np.asarray(codes) for codes, _ in samples])
        best, wrong = [], []
        for k, text in enumerate(texts):
            errors = {}
            for j in range(k * n, k * n + n):
                pair = comparable(text, heard[j]) if whisper else (text.lower(), heard[j].lower())
                errors[j] = edit_distance(*(words.split() for words in pair))
            chosen = min(errors, key=lambda j: (errors[j], not samples[j][1]))
            best.append(samples[chosen])
            wrong.append(errors[chosen] / max(1, len(text.split())))
        return best, wrong

    def speak(self, text, prompt, n=1, generator=None, whisper=None):
        """Speech of a text of any length -> (wav (m,), {"ended", "wrong"}): in pieces, a breath between."""
        pieces = cut_text(text) or [text]
        best, wrong = self.synthesise_best(pieces, [prompt] * len(pieces), n, generator, whisper)
        breath, wavs = np.zeros(Tokenizer.sample_rate // 10, np.float32), []
        for codes, _ in best:
            wavs += [self.decode(codes), breath]
        about = {"ended": all(ended for _, ended in best), "wrong": wrong and float(np.mean(wrong))}
        return np.concatenate(wavs[:-1]), about

    def synthesise_stream(self, text, prompt, generator=None, chunk=25, overlap=6):
        """Yields wav pieces (n,) at 16 kHz while it decodes: every `chunk` frames what is certain by then.

        Where the codec goes on by itself, pieces fit. Else one is decoded with `overlap` frames of the one
        before, into which it is faded, since phases do not fit at a border. Frame t is complete N-1 steps
        after its semantic token.
        """
        decode_next = self.voice().start_decoding()
        done, tail, hop = 0, np.zeros(0, np.float32), int(Tokenizer.sample_rate / Tokenizer.frame_hz)
        going = steps(self.model, self.vocab, [self.tts_prefix(text, prompt)],
                      *self.speech_options(generator, [text]))
        state, count = next(going), 1
        while state is not None:
            frames, known, eos = state
            state, count = next(going, None), count + 1
            ready = int(min(eos - known, count - self.vocab.n_stream))      # complete frames
            if state is not None and ready - done < chunk:
                continue
            if decode_next:
                codes = speech_codes(self.vocab, frames[0, known[0] + done:known[0] + ready])
                done = ready
                if len(codes):
                    yield decode_next(codes)
                continue
            start = max(0, done - len(tail) // hop)
            wav = self.decode(speech_codes(self.vocab, frames[0, known[0] + start:known[0] + ready]))
            fade = np.linspace(0, 1, len(tail), dtype=np.float32)
            wav[:len(tail)] = tail * (1 - fade) + wav[:len(tail)] * fade
            keep = 0 if state is None else overlap * hop
            tail, done = wav[len(wav) - keep:], ready
            yield wav[:len(wav) - keep]

    def continue_speech(self, codes, generator=None):
        """codes (T, N) -> (the new codes (L, N), ended)."""
        prefix = generation_prefix(self.vocab, "speech", {"speech": speech_frames(self.vocab, codes)})
        [(frames, ended)] = generate(self.model, self.vocab, [prefix], *self.speech_options(generator))
        return speech_codes(self.vocab, frames), ended

    def continue_text(self, text, max_tokens=50, generator=None):
        prefix = generation_prefix(self.vocab, "text", {"text": self.ids(text)})
        c = self.config
        [(frames, _)] = generate(self.model, self.vocab, [prefix], TEXT, max_tokens, 0, c.temperature, 0,
                                 c.top_k, generator, c.top_p)
        return f"{text} {self.text(frames)}".strip()


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
            speaker.tokenizer.save(f"{beside}/audio_tokenizer")
    os.rename(beside, folder.rstrip("/"))
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")


def write_stream(path, pieces):
    """Write wav pieces as they come, `-`: as bare 16-bit samples to stdout; says how long the first took."""
    began, first, n, rate = time.time(), None, 0, Tokenizer.sample_rate
    bare = path == "-"
    with nullcontext(sys.stdout.buffer) if bare else soundfile.SoundFile(path, "w", rate, 1) as out:
        for piece in pieces:
            first = first or time.time() - began
            out.write((32767 * piece.clip(-1, 1)).astype("<i2").tobytes() if bare else piece)
            out.flush()
            n += len(piece)
    print(f"{path}: {n / rate:.2f} s of sound in {time.time() - began:.2f} s, the first after {first:.2f} s",
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
    parser.add_argument("--out", default="out.wav", help="tts, continue: the wav to write")
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
    parser.add_argument("--whisper", help="tts --best: by this Whisper's ear (CTranslate2 form) instead")
    parser.add_argument("--json", action="store_true", help="asr: a line of json for each file")
    parser.add_argument("--explain", metavar="PAGE", help="asr, tts: look inside, see explain.py")
    parser.add_argument("--head", help="LAYER,HEAD whose attention that page shows (default: the best)")
    parser.add_argument("--stream", action="store_true", help="tts: write while it speaks; --out - to stdout")
    args = parser.parse_args(arguments)
    speaker = Speaker(args.run, quant=args.quant, dtype=args.dtype)
    for name in ("temperature", "acoustic_temperature", "top_k", "top_p", "guidance"):
        if getattr(args, name) is not None:
            setattr(speaker.config, name, getattr(args, name))
    generator = torch.Generator().manual_seed(args.seed)
    read = lambda path: speaker.encode(load_audio(path))
    from_stdin = args.input == ["-"]
    if args.explain:
        return explain(speaker, args, generator)
    lines = [line.strip() for line in sys.stdin if line.strip()] if from_stdin else args.input
    if args.task == "asr":
        return transcribe_files(speaker, lines, args)
    if args.task == "text":
        for text in lines if from_stdin else [" ".join(lines)]:
            print(speaker.continue_text(text, generator=generator), flush=True)
    elif args.task == "tts":
        prompt = read(args.prompt) if args.prompt else None
        if args.stream:
            return write_stream(args.out, speaker.synthesise_stream(" ".join(lines), prompt, generator))
        speak_all(speaker, lines if from_stdin else [" ".join(lines)], prompt, args, generator)
    else:
        given = read(args.input[0])
        new, ended = speaker.continue_speech(given, generator)
        wav = speaker.decode(torch.cat([torch.from_numpy(given), new]))
        soundfile.write(args.out, wav, Tokenizer.sample_rate)
        print(f"{args.out}: {how_it_ended(speaker, wav, ended)}")


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
            print(json.dumps(line, ensure_ascii=False) if args.json else line.get("text", ""), flush=True)
    return code


def how_it_ended(speaker, wav, ended):
    seconds, limit = len(wav) / Tokenizer.sample_rate, speaker.config.max_speech_s
    return f"{seconds:.2f} s, " + (
        "ended by itself" if ended else f"cut at its limit (at most {limit:g} s), no end came")


def speak_all(speaker, texts, prompt, args, generator):
    """One text into the wav args.out; lines of stdin into that folder, with samples.jsonl about each."""
    whisper, missing = open_whisper(args.whisper) if args.whisper else (None, None)
    if missing:
        raise ValueError(missing)
    for number, text in enumerate(texts):
        path = args.out
        if args.input == ["-"]:
            os.makedirs(args.out, exist_ok=True)
            path = f"{args.out}/{number:04d}.wav"
        wav, about = speaker.speak(text, prompt, args.best, generator, whisper)
        soundfile.write(path, wav, Tokenizer.sample_rate)
        ear = "Whisper's" if whisper else "its own"
        print(f"{path}: {how_it_ended(speaker, wav, about['ended'])}"
              + (f"; {100 * about['wrong']:.0f} % wrong by {ear} ear" if args.best > 1 else ""), flush=True)
        if args.input == ["-"]:
            about |= {"wav": path, "text": text, "prompt": args.prompt,
                      "seconds": len(wav) / Tokenizer.sample_rate}
            with open(f"{args.out}/samples.jsonl", "a" if number else "w", encoding="utf-8") as f:
                f.write(json.dumps(about, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
