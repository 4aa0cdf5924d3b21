"""Word error rates: how errors are counted, how sure a figure is, Whisper as a judge.

Helper of sample.py and eval.py. A reference is what was said, a hypothesis what somebody heard. Texts are
compared as they are; what Whisper writes ("Mr. Smith paid $20.") is first brought into one spelling with the
reference by Whisper's own English normaliser. Whisper itself is a folder or hub id, openai/whisper-base for
instance, read by transformers, or what ct2-transformers-converter makes of it, read by faster-whisper.
"""
import functools
import json
import os
import re

import numpy as np
import tokenizers
import torch

from spoken_numbers import ONES, TENS, cardinal, digits
from tokenize_audio import SAMPLE_RATE, cut_wav
from tokenize_text import find_folder

NUMBER_WORDS = {*ONES, *TENS, "hundred", "thousand", "and"}
WHISPER_FILES = ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json",
                 "model.safetensors", "model-0*.safetensors", "model.safetensors.index.json", "model.bin",
                 "vocabulary.*")


def edit_distance(reference, hypothesis):
    """Fewest insertions, deletions and substitutions between two lists (Levenshtein)."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, h in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(diagonal + (r != h), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def edit_counts(reference, hypothesis):
    """Substitutions, insertions, deletions of one cheapest way from one list to the other."""
    row = [(j, 0, j, 0) for j in range(len(hypothesis) + 1)]        # errors, and of them sub, ins, del
    for i, r in enumerate(reference, 1):
        above, row = row, [(i, 0, 0, i)]
        for j, h in enumerate(hypothesis, 1):
            (e, s, a, d), (e2, s2, a2, d2), (e3, s3, a3, d3) = above[j - 1], row[j - 1], above[j]
            wrong = int(r != h)
            row.append(min((e + wrong, s + wrong, a, d), (e2 + 1, s2, a2 + 1, d2), (e3 + 1, s3, a3, d3 + 1)))
    return row[-1][1:]


def word_errors(references, hypotheses, cap=False):
    """-> errors (M,), words of the references (M,). cap: an utterance's errors count at most its words, so
    that one endless repetition does not stand for the whole test."""
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)]
    errors, words = np.array([edit_distance(*pair) for pair in pairs]), np.array([len(r) for r, _ in pairs])
    return np.minimum(errors, words) if cap else errors, words


def word_error_rate(references, hypotheses):
    """Corpus WER in percent: all errors / all reference words."""
    errors, words = word_errors(references, hypotheses)
    return float(100 * errors.sum() / words.sum())


def error_report(references, hypotheses):
    """What WER is made of -> words with insertions, deletions and substitutions, the mean over utterances,
    character errors, 95 % intervals, and the worst utterances."""
    counts = np.array([edit_counts(r.split(), h.split()) for r, h in zip(references, hypotheses)])  # (M, 3)
    words, errors = np.array([len(r.split()) for r in references]), counts.sum(1)
    letters = [edit_distance(r, h) for r, h in zip(references, hypotheses)]
    wer, low, high = interval(errors, words)
    cer, *cer_spread = interval(letters, [len(r) for r in references])
    worst = np.argsort(-errors / np.maximum(words, 1), kind="stable")[:5]
    mean, *mean_spread = interval(errors / np.maximum(words, 1))
    return {"wer": 100 * wer, "wer_interval": [100 * low, 100 * high],
            "wer_mean_of_utterances": 100 * mean, "wer_mean_interval": [100 * x for x in mean_spread],
            "cer": 100 * cer, "cer_interval": [100 * x for x in cer_spread],
            "words": int(words.sum()), **dict(zip(("substitutions", "insertions", "deletions"),
                                                 counts.sum(0).tolist())),
            "worst": [[references[k], hypotheses[k]] for k in worst]}


def interval(values, of=None, n=1000, seed=0):
    """Mean of values (M,), or sum(values) / sum(of), with its 95 % interval by bootstrap over the M
    utterances or questions: (estimate, low, high). A draw in which nothing is counted says nothing."""
    values = np.asarray(values, float)
    of = np.ones(len(values)) if of is None else np.asarray(of, float)
    picked = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    picked = picked[of[picked].sum(1) > 0]
    again = values[picked].sum(1) / of[picked].sum(1)
    return float(values.sum() / of.sum()), *map(float, np.percentile(again, [2.5, 97.5]))


def capped_rate(name, references, hypotheses):
    """The capped WER in percent, with its 95 % interval -> {name: WER, name_interval: [low, high]}."""
    wer, *spread = interval(*word_errors(references, hypotheses, cap=True))
    return {name: 100 * wer, f"{name}_interval": [100 * x for x in spread]}


def rated(references, hypotheses, cap=False):
    """-> items of a WER in percent, as results.keep_results takes them."""
    errors, words = word_errors(references, hypotheses, cap)
    return [[r, 100 * int(e), int(w)] for r, e, w in zip(references, errors, words)]


# ---- Whisper -----------------------------------------------------------------------------------------------

def spell_out(hypothesis, reference):
    """Whisper's spelling -> words: lower case, no punctuation, numerals digit by digit where the reference is
    a digit string and as cardinals otherwise: ('7-3 5.', 'seven three five') -> 'seven three five'."""
    is_digits = all(word in ONES[:10] for word in reference.split())
    text = re.sub(r"(?<=\d),(?=\d{3})", "", hypothesis.lower())             # 2,345 -> 2345

    def words(match):
        numeral = match.group()
        return f" {digits(numeral) if is_digits or int(numeral) > 9999 else cardinal(int(numeral))} "

    return " ".join(re.sub(r"[^a-z ]", " ", re.sub(r"\d+", words, text)).split())


def comparable(reference, hypothesis):
    """What was said and what Whisper wrote, both in one spelling -> (reference, hypothesis). Spoken numbers
    are spelled out; for all else we take Whisper's own English normaliser."""
    if set(reference.split()) <= NUMBER_WORDS:
        return reference, spell_out(hypothesis, reference)
    normalise = english()
    return normalise(reference), normalise(hypothesis)


@functools.cache
def english():
    from whisper_normalizer.english import EnglishTextNormalizer
    return EnglishTextNormalizer()


def with_silence(wav):
    """wav (n,) at 16 kHz, with half a second around it: Whisper is poor on bare short clips."""
    silence = np.zeros(SAMPLE_RATE // 2, np.float32)
    return np.concatenate([silence, wav.astype(np.float32), silence])


class FastWhisper:
    """An external judge through faster-whisper, a model in CTranslate2 form: hear(wav) -> what it wrote,
    greedily. Its usual retries, at rising temperatures where it is unsure, are off: a judge says the same
    each time."""

    def __init__(self, folder):
        from faster_whisper import WhisperModel
        self.model = WhisperModel(folder, device="cpu", compute_type="float32", cpu_threads=os.cpu_count())

    def hear(self, wav):
        """wav (n,) at 16 kHz, of any length -> text."""
        segments, _ = self.model.transcribe(with_silence(wav), language="en", beam_size=1, temperature=0.0,
                                            without_timestamps=True, condition_on_previous_text=False)
        return " ".join(segment.text for segment in segments)


class Whisper:
    """The same judge through transformers, a model as the hub has it. Only faster-whisper drops a piece
    that it takes for silence."""

    def __init__(self, folder):
        with open(f"{folder}/config.json") as f:
            about = json.load(f)
        if about.get("model_type") != "whisper":
            raise ValueError(f"config.json has the model_type {about.get('model_type')!r}")
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
        self.model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.features = WhisperFeatureExtractor(feature_size=self.model.config.num_mel_bins)
        with open(f"{folder}/tokenizer.json", encoding="utf-8") as f:
            self.tokenizer = tokenizers.Tokenizer.from_str(f.read())
        number, options = self.tokenizer.token_to_id, self.model.generation_config
        self.end = number("<|endoftext|>")
        # not every folder has a generation_config.json that says these, and transformers' own length is 20
        options.max_length = self.model.config.max_target_positions
        options.no_timestamps_token_id = number("<|notimestamps|>")
        options.lang_to_id = {"<|en|>": number("<|en|>")}
        options.task_to_id = {"transcribe": number("<|transcribe|>")}
        options.is_multilingual = self.model.config.vocab_size >= 51865     # English-only models lack a token
        self.task = {"language": "en", "task": "transcribe"} if options.is_multilingual else {}

    def hear(self, wav):
        """wav (n,) at 16 kHz, of any length: cut at quiet places to what Whisper's 30 s hold -> text."""
        texts = []
        for piece in cut_wav(wav, 28):
            mel = self.features(with_silence(piece), sampling_rate=SAMPLE_RATE, return_tensors="pt")
            [ids] = self.model.generate(mel.input_features, do_sample=False, num_beams=1, **self.task)
            texts.append(self.tokenizer.decode(ids[ids < self.end].tolist()))       # the others are special
        return " ".join(texts)


def open_whisper(name):
    """Folder of a Whisper, or id on the Hugging Face hub -> (FastWhisper or Whisper, whichever reads what is
    there, None), or (None, how to get what is missing)."""
    try:
        english()
        folder = find_folder(name, WHISPER_FILES)
        return (FastWhisper if os.path.isfile(f"{folder}/model.bin") else Whisper)(folder), None
    except ImportError as problem:
        return None, f"no {problem.name}: pip install -e '.[eval]'"
    except (ValueError, OSError, RuntimeError) as problem:
        return None, (f"no Whisper in {name} ({str(problem).splitlines()[0]}): give openai/whisper-base or "
                      "another id, its folder, or what ct2-transformers-converter makes of that; and "
                      "pip install -e '.[eval]'")
