"""Sample: recognise, speak, continue.

Tenth file of the reading order.
  python sample.py out/numbers asr a.wav b.wav                                   one transcript a line
  python sample.py out/numbers tts "seven three five" --prompt voice.wav --out x.wav
  python sample.py out/numbers continue a.wav --out x.wav
  python sample.py out/numbers text "seven three"
  python sample.py export out/numbers folder                 model, configuration and tokenizers, for others
  python sample.py export out/numbers folder --text-only     a plain text LLM, for `transformers`
Decoding follows the released models (ESPnet-SpeechLM, arXiv 2502.15218): the marker of the wanted modality is
given, each stream may only choose its own ids, and after the end token N-1 more steps bring in the delayed
acoustic tokens.
"""
import argparse
import os
import shutil
import sys

import soundfile
import torch

from convert import export_text, is_published
from data import prompt_frames
from heads import acoustic_logits, stream_logits
from interleave import (
    EOS,
    PAD,
    SPEECH,
    TEXT,
    Vocab,
    delay,
    generation_prefix,
    speech_codes,
    speech_frames,
    text_frames,
)
from model import KVCache
from parallel import load_model, save_model
from tokenize_audio import Tokenizer, load_audio
from tokenize_text import TOKENIZER_FILES, TextTokenizer, find_folder


def pick(logits, temperature, top_k, generator=None):
    """One id of each row: logits (..., C) -> (...). The best at temperature 0, else a draw of the top k."""
    if temperature == 0:
        return logits.argmax(-1)
    best, ids = logits.topk(min(top_k, logits.shape[-1]))                   # (..., k)
    choice = torch.multinomial((best / temperature).softmax(-1).flatten(0, -2), 1, generator=generator)
    return ids.gather(-1, choice.view(*ids.shape[:-1], 1))[..., 0]


@torch.no_grad()
def generate(model, vocab, prefixes, modality, max_frames, min_frames=1, temperature=0.0,
             acoustic_temperature=0.0, top_k=30, generator=None):
    """Go on from aligned prefixes [(T_i, N)] -> [(frames (L, N), ended)]: the new aligned frames without eos.

    A step predicts the delayed row t: stream n's entry belongs to frame t - n. It is one of three things:
        frame t - n < prefix   known already (pads after a marker; acoustic tokens still due)
        frame t - n >= eos     pad
        else                   sampled, by the mask of its stream
    ended: whether eos came by itself, within max_frames.
    """
    B, N, device = len(prefixes), vocab.n_stream, model.emb.device
    known = torch.tensor([len(prefix) for prefix in prefixes], device=device)               # (B,)
    if known.min() == 0:
        raise ValueError("nothing to start from: give at least one token")
    longest = int(known.max())
    frames = torch.full((B, longest + max_frames + N, N), PAD, device=device)               # aligned
    for b, prefix in enumerate(prefixes):
        frames[b, :len(prefix)] = prefix
    cache = KVCache(model.config, B, longest + max_frames + N, device, model.dtype)
    hidden = model.extend(delay(frames)[:, :longest], cache, torch.zeros_like(known))       # (B, longest, D)
    rows, streams = torch.arange(B, device=device), torch.arange(N, device=device)
    hidden = hidden[rows, known - 1]                                                        # (B, D)

    own = vocab.streams[0] if modality == SPEECH else vocab.text
    own = torch.arange(*own, device=device)
    allowed = torch.cat([torch.tensor([EOS], device=device), own])                          # of stream 0
    starts = torch.tensor([start for start, _ in vocab.streams], device=device)
    drain = N - 1 if modality == SPEECH else 0
    eos = known + max_frames                                                                # where eos stands
    for step in range(max_frames + drain):
        t = known + step                                                    # (B,) the row to predict
        row = torch.full((B, N), PAD, device=device)
        logits = stream_logits(model, hidden, 0, allowed)
        if step < min_frames:
            logits[:, 0] = -torch.inf
        row[:, 0] = allowed[pick(logits, temperature, top_k, generator)]
        if modality == SPEECH and N > 1:
            codes = pick(acoustic_logits(model, hidden), acoustic_temperature, top_k, generator)    # (B, K)
            row[:, 1:] = codes + starts[1:]
        eos = torch.where((row[:, 0] == EOS) & (t < eos), t, eos)
        frame = t[:, None] - streams                                                        # (B, N)
        given = frame < known[:, None]
        row = torch.where(given, frames[rows[:, None], frame, streams], row)
        row = torch.where((frame >= eos[:, None]) & ~given, PAD, row)
        frames[rows[:, None], frame, streams] = row
        if (t + 1 >= eos + drain).all():
            break
        row[:, 0] = torch.where(t == eos, EOS, row[:, 0])
        hidden = model.extend(row[:, None], cache, t)[:, 0]                                 # (B, D)
    return [(frames[b, known[b]:eos[b]].cpu(), bool(eos[b] < known[b] + max_frames)) for b in range(B)]


# ---- tasks -------------------------------------------------------------------------------------------------

class Speaker:
    """A trained model with its tokenizers: `transcribe`, `synthesise`, `continue_speech`, `continue_text`."""

    def __init__(self, run, device="cpu"):
        self.model, self.config, self.vocab, self.state = load_model(run, device)
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
        if self.tokenizer is None or self.config.token_streams == "semantic":
            raise ValueError(f"{self.run} has no acoustic tokens: what it says has no sound")
        return self.tokenizer.decode(codes)

    def max_speech(self):
        return int(self.config.max_speech_s * Tokenizer.frame_hz)

    def text(self, frames):
        return self.text_tokenizer.decode((frames[:, 0] - self.vocab.text_start).tolist())

    def ids(self, text):
        if not text.strip():
            raise ValueError("the text is empty")
        return text_frames(self.vocab, self.text_tokenizer.encode(text))

    def transcribe(self, codes, batch=50):
        """Recognition, greedy: [codes (T, N)] -> [text], of at most T / 4 + 8 tokens."""
        order, texts = sorted(range(len(codes)), key=lambda i: len(codes[i])), [""] * len(codes)
        for start in range(0, len(order), batch):
            part = order[start:start + batch]
            speech = [speech_frames(self.vocab, codes[i]) for i in part]
            prefixes = [generation_prefix(self.vocab, "asr", {"speech": frames}) for frames in speech]
            limit = max(len(codes[i]) for i in part) // 4 + 8
            for i, (frames, _) in zip(part, generate(self.model, self.vocab, prefixes, TEXT, limit)):
                texts[i] = self.text(frames[:len(codes[i]) // 4 + 8])    # its own limit, not the batch's
        return texts

    def synthesise(self, texts, prompts, generator=None, batch=50):
        """Speech synthesis: [text] and voice prompts [codes (T, N) or None] -> [(codes (L, N), ended)]."""
        results, c = [], self.config
        if any(prompt is None for prompt in prompts) and not c.mixture.get("plain_tts"):
            raise ValueError("this model has not learned to speak without a voice prompt (task plain_tts): "
                             "give one, --prompt voice.wav")
        for start in range(0, len(texts), batch):
            prefixes = []
            for text, prompt in zip(texts[start:start + batch], prompts[start:start + batch]):
                entries = {"text": self.ids(text)}
                if prompt is not None:
                    entries["prompt"] = prompt_frames(self.vocab, prompt[:c.prompt_len], c.prompt_len)
                task = "plain_tts" if prompt is None else "tts"
                prefixes.append(generation_prefix(self.vocab, task, entries))
            results += generate(self.model, self.vocab, prefixes, SPEECH, self.max_speech(), 3, c.temperature,
                                c.acoustic_temperature, c.top_k, generator)
        return [(speech_codes(self.vocab, frames), ended) for frames, ended in results]

    def continue_speech(self, codes, generator=None):
        """codes (T, N) -> (the new codes (L, N), ended)."""
        prefix = generation_prefix(self.vocab, "speech", {"speech": speech_frames(self.vocab, codes)})
        c = self.config
        [(frames, ended)] = generate(self.model, self.vocab, [prefix], SPEECH, self.max_speech(), 1,
                                     c.temperature, c.acoustic_temperature, c.top_k, generator)
        return speech_codes(self.vocab, frames), ended

    def continue_text(self, text, max_tokens=50, generator=None):
        prefix = generation_prefix(self.vocab, "text", {"text": self.ids(text)})
        c = self.config
        [(frames, _)] = generate(self.model, self.vocab, [prefix], TEXT, max_tokens, 0, c.temperature, 0,
                                 c.top_k, generator)
        return f"{text} {self.text(frames)}".strip()


def export(run, folder, text_only=False):
    """Write a folder to hand on: all of the model and its tokenizers, which sample.py and eval.py read again;
    or, text_only, the LLM that is left without speech, in Hugging Face's form."""
    if os.path.exists(folder):
        raise ValueError(f"{folder} is there already: name a new folder")
    speaker, beside = Speaker(run), folder.rstrip("/") + ".tmp"
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
        state = {name: value for name, value in speaker.state.items() if name not in ("vocab", "data")}
        save_model(beside, speaker.config, speaker.vocab, speaker.model, state)
        speaker.text_tokenizer.save(f"{beside}/text_tokenizer")
        if speaker.tokenizer:
            speaker.tokenizer.save(f"{beside}/audio_tokenizer")
    os.rename(beside, folder.rstrip("/"))
    print(f"{folder}: {', '.join(sorted(os.listdir(folder)))}")


def main():
    if sys.argv[1:2] == ["export"]:
        parser = argparse.ArgumentParser(prog="sample.py export", description=export.__doc__)
        parser.add_argument("run", help="folder of a run, of a checkpoint, or of a published OpusLM")
        parser.add_argument("folder", help="a new folder")
        parser.add_argument("--text-only", action="store_true", help="a plain LLM for `transformers`")
        args = parser.parse_args(sys.argv[2:])
        return export(args.run, args.folder, args.text_only)
    about, examples = __doc__.split("\n")[0], __doc__.split("reading order.")[1]
    parser = argparse.ArgumentParser(description=about, epilog=examples,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run or of a checkpoint")
    parser.add_argument("task", choices=["asr", "tts", "continue", "text"])
    parser.add_argument("input", nargs="+", help="audio files, or the text")
    parser.add_argument("--prompt", help="tts: a recording of the voice to speak in, a second or more")
    parser.add_argument("--out", default="out.wav", help="tts, continue: the wav to write")
    parser.add_argument("--temperature", type=float, help="of text and semantic tokens (default: the run's)")
    parser.add_argument("--acoustic_temperature", type=float, help="of the acoustic tokens")
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    speaker = Speaker(args.run)
    for name in ("temperature", "acoustic_temperature", "top_k"):
        if getattr(args, name) is not None:
            setattr(speaker.config, name, getattr(args, name))
    generator = torch.Generator().manual_seed(args.seed)
    read = lambda path: speaker.encode(load_audio(path))
    if args.task == "asr":
        for text in speaker.transcribe([read(path) for path in args.input]):
            print(text)
    elif args.task == "text":
        print(speaker.continue_text(" ".join(args.input), generator=generator))
    else:
        if args.task == "tts":
            prompt = read(args.prompt) if args.prompt else None
            [(codes, ended)] = speaker.synthesise([" ".join(args.input)], [prompt], generator)
        else:
            given = read(args.input[0])
            new, ended = speaker.continue_speech(given, generator)
            codes = torch.cat([torch.from_numpy(given), new])
        soundfile.write(args.out, speaker.decode(codes), Tokenizer.sample_rate)
        print(f"{args.out}: {len(codes) / Tokenizer.frame_hz:.2f} s, "
              + ("ended by itself" if ended else f"cut after {speaker.config.max_speech_s:g} s, no end came"))


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        print(f"sample.py: {problem}", file=sys.stderr)
        sys.exit(2)
