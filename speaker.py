"""Speaker: a trained model with its tokenizers, which hears, speaks and goes on.

Fourteenth file of the reading order. From codes to texts and back is here, and what it takes for long ones;
one step of decoding is in decode.py, the commands are in sample.py.
"""
import os

import numpy as np
from tqdm import tqdm

from checkpoint import load_model
from config import check_sampling
from convert import is_published
from data import prompt_frames
from decode import beam_search, generate, prepare_for_decoding, steps
from interleave import SPEECH, TEXT, Vocab, generation_prefix, speech_codes, speech_frames, text_frames
from results import home_of
from tokenize_audio import Tokenizer, cut_wav
from tokenize_text import TOKENIZER_FILES, TextTokenizer, find_folder
from wer import comparable, edit_distance

LETTER_S = 0.02, 0.24       # speech is not shorter (50 letters a second) nor longer (4, and a second more)
PIECE_LETTERS = 200         # longer texts are spoken piece by piece,
BREATH = np.zeros(Tokenizer.sample_rate // 10, np.float32)      # with silence between


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

    def __init__(self, run, quant="", dtype="auto"):
        self.model, self.config, self.vocab, self.state = load_model(run, dtype=dtype)
        prepare_for_decoding(self.model, quant)
        self.run, self.checkpoint, self.tokenizer, self.frame_hz = run, "", None, Tokenizer.frame_hz
        if is_published(run):           # its text tokenizer is the base LLM's; audio tokenizers are elsewhere
            beside = os.path.exists(f"{run}/tokenizer.json")
            folder = run if beside else find_folder(self.config.init_from, TOKENIZER_FILES)
            self.text_tokenizer = TextTokenizer.load(folder)
            return
        self.run, self.checkpoint = home_of(run)
        self.text_tokenizer = TextTokenizer.load(f"{self.run}/text_tokenizer")
        if os.path.isdir(f"{self.run}/audio_tokenizer"):
            self.tokenizer = t = Tokenizer.load(f"{self.run}/audio_tokenizer")
            self.frame_hz = t.frame_hz
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

    def text(self, frames):
        return self.text_tokenizer.decode((frames[:, 0] - self.vocab.text_start).tolist())

    def ids(self, text):
        if not text.strip():
            raise ValueError("the text is empty")
        text = text.lower() if self.config.lower else text                  # as the transcripts were
        return text_frames(self.vocab, self.text_tokenizer.encode(text))

    def recognise(self, codes, batch=50, beam=1):
        """Greedy or by a beam: [codes (T, N)] -> [(text, ended)]. Letters are some 15 a second; a text that
        goes on and on, mostly in circles, is cut at 25 a second, and 8 more, and at as many tokens."""
        order, read = sorted(range(len(codes)), key=lambda i: len(codes[i])), [None] * len(codes)
        for start in range(0, len(order), batch):
            part = order[start:start + batch]
            speech = [speech_frames(self.vocab, codes[i], self.config.semantic_asr) for i in part]
            prefixes = [generation_prefix(self.vocab, "asr", {"speech": frames}) for frames in speech]
            limits = [int(len(codes[i]) / self.frame_hz * 25) + 8 for i in part]
            if beam > 1:
                shown = tqdm(prefixes, "beam search", mininterval=2, disable=len(prefixes) < 5)
                found = [beam_search(self.model, self.vocab, prefix, TEXT, limit, beam)
                         for prefix, limit in zip(shown, limits)]
            else:
                found = generate(self.model, self.vocab, prefixes, TEXT, limits)
            for i, limit, (frames, ended) in zip(part, limits, found):
                text = self.text(frames)
                read[i] = (text if ended else text[:limit].rstrip()), ended
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
        c, shortest, unguided = self.config, 1, None
        longest = int(c.max_speech_s * self.frame_hz)
        if texts:
            low, high = (round(seconds * self.frame_hz, 6) for seconds in LETTER_S)
            shortest = [max(3, min(longest, int(low * len(text)))) for text in texts]
            longest = [min(longest, int(high * len(text) + self.frame_hz)) for text in texts]
            check_sampling(c)
            unguided = generation_prefix(self.vocab, "speech", {})
        return dict(modality=SPEECH, max_frames=longest, min_frames=shortest, temperature=c.temperature,
                    acoustic_temperature=c.acoustic_temperature, top_k=c.top_k, top_p=c.top_p,
                    generator=generator, unguided=unguided, guidance=c.guidance if texts else 1.0)

    def tts_entries(self, text, prompt):
        """text, prompt codes (T, N) or None -> the task, and what stands before speech {"text", "prompt"}."""
        entries, c = {"text": self.ids(text)}, self.config
        task = "plain_tts" if prompt is None else "tts"
        if not c.mixture.get(task):
            raise ValueError("this model has not learned to speak " + (
                "without a voice prompt (task plain_tts): give one, --prompt voice.wav" if prompt is None else
                "in a voice that it is given (task tts): leave the voice prompt away"))
        if task == "tts":
            entries["prompt"] = prompt_frames(self.vocab, prompt[:c.prompt_len], c.prompt_len)
        return task, entries

    def synthesise(self, texts, prompts, generator=None, batch=50):
        """Speech synthesis: [text] and voice prompts [codes (T, N) or None] -> [(codes (L, N), ended)]."""
        results, prefixes = [], [generation_prefix(self.vocab, *self.tts_entries(*given))
                                 for given in zip(texts, prompts)]
        for start in range(0, len(texts), batch):
            part = slice(start, start + batch)
            options = self.speech_options(generator, texts[part])
            results += generate(self.model, self.vocab, prefixes[part], **options)
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
        wavs = []
        for codes, _ in best:
            wavs += [self.decode(codes), BREATH]
        return np.concatenate(wavs[:-1]), {"ended": all(ended for _, ended in best),
                                           "wrong": wrong and float(np.mean(wrong))}

    def synthesise_stream(self, texts, prompt, generator=None, **options):
        """Yields speech of [text], each of any length, wav pieces (n,) at 16 kHz, while it decodes. Returns
        whether all of it ended by itself."""
        ends = []
        for part in (part for text in texts for part in cut_text(text) or [text]):
            if ends:
                yield BREATH
            ends.append((yield from self.stream_part(part, prompt, generator, **options)))
        return all(ends)

    def stream_part(self, text, prompt, generator, chunk=25, overlap=6):
        """One part of it: every `chunk` frames what is certain by then.

        Where the codec goes on by itself, pieces fit. Else one is decoded with `overlap` frames of the one
        before, into which it is faded, since phases do not fit at a border. Frame t is complete
        delay * (N-1) steps after its semantic token.
        """
        decode_next = self.voice().start_decoding()
        done, tail, hop = 0, np.zeros(0, np.float32), Tokenizer.sample_rate / self.frame_hz
        later = self.vocab.delay * (self.vocab.n_stream - 1)
        options = self.speech_options(generator, [text])
        prefix = generation_prefix(self.vocab, *self.tts_entries(text, prompt))
        going = steps(self.model, self.vocab, [prefix], **options)
        state, count = next(going), 1
        while state is not None:
            frames, known, eos = state
            state, count = next(going, None), count + 1
            ready = int(min(eos - known, count - 1 - later))                # complete frames
            if state is not None and ready - done < chunk:
                continue
            if decode_next:
                codes = speech_codes(self.vocab, frames[0, known[0] + done:known[0] + ready])
                done = ready
                if len(codes):
                    yield decode_next(codes)
                continue
            start = max(0, done - round(len(tail) / hop))
            wav = self.decode(speech_codes(self.vocab, frames[0, known[0] + start:known[0] + ready]))
            fade = np.linspace(0, 1, len(tail), dtype=np.float32)
            wav[:len(tail)] = tail * (1 - fade) + wav[:len(tail)] * fade
            keep = 0 if state is None else round(overlap * hop)
            tail, done = wav[len(wav) - keep:], ready
            yield wav[:len(wav) - keep]
        return bool(eos[0] < known[0] + options["max_frames"][0])

    def continue_speech(self, codes, generator=None):
        """codes (T, N) -> (the new codes (L, N), ended)."""
        prefix = generation_prefix(self.vocab, "speech", {"speech": speech_frames(self.vocab, codes)})
        [(frames, ended)] = generate(self.model, self.vocab, [prefix], **self.speech_options(generator))
        return speech_codes(self.vocab, frames), ended

    def continue_text(self, text, max_tokens=50, generator=None):
        """A text -> (it with what follows, ended)."""
        prefix = generation_prefix(self.vocab, "text", {"text": self.ids(text)})
        c = self.config
        [(frames, ended)] = generate(self.model, self.vocab, [prefix], TEXT, max_tokens, min_frames=0,
                                 temperature=c.temperature, top_k=c.top_k, top_p=c.top_p, generator=generator)
        return f"{text} {self.text(frames)}".strip(), ended
