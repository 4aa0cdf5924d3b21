"""Evaluate voices: is it the prompt's voice, does it sound natural, how high and how fast does it speak?

Helper of eval.py:  python eval_voice.py out/numbers --n=40
The model speaks texts of held-out voices. Beside its speech stand the recording of the same text (tokenized
and decoded, which is as good as it can get) and one of another speaker (the floor of similarity). Most
measures come from packages that bring their weights, a line says how to get what is missing (exit code 3):
  similarity   cosine of speaker embeddings to the prompt's: resemblyzer, or --speaker_model=FOLDER of an
               x-vector model for transformers (for instance microsoft/wavlm-base-plus-sv)
  DNSMOS       predicted mean opinion score, P.835 overall and P.808: speechmos
  UTMOS        another one, with --utmos=FILE: utmos_scripted.pt of Blinorot/UTMOS-PyTorch on the hub
  pitch, rate  median fundamental in Hz and its spread in semitones (librosa), letters a second
Folder RUN/voices keeps the wavs and the wav.scp, prompt.scp, original.scp and text that VERSA takes.
"""
import argparse
import os
from dataclasses import replace

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from checkpoint import same_vocab
from config import synthesis_task
from data import Dataset
from eval import find_data, pick_utterances
from results import file_ending, keep_results
from script import run_script
from speaker import Speaker
from tokenize_audio import SAMPLE_RATE
from wer import interval

PIP = {"resemblyzer": "pip install --no-deps resemblyzer webrtcvad-wheels; pip install librosa",
       "speechmos": "pip install --no-deps speechmos; pip install librosa onnxruntime",
       "librosa": "pip install librosa", "transformers": "pip install transformers"}


def speaker_embedder(folder=None):
    """-> function wav (n,) at 16 kHz -> unit vector (D,), by resemblyzer or by an x-vector model's folder."""
    if folder:
        from transformers import AutoFeatureExtractor, AutoModelForAudioXVector
        prepare = AutoFeatureExtractor.from_pretrained(folder)
        model = AutoModelForAudioXVector.from_pretrained(folder).eval()

        @torch.no_grad()
        def embed(wav):
            x = prepare(wav, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
            return torch.nn.functional.normalize(model(x).embeddings[0], dim=0).numpy()
        return embed
    from resemblyzer import VoiceEncoder, preprocess_wav
    encoder = VoiceEncoder("cpu", verbose=False)
    return lambda wav: encoder.embed_utterance(preprocess_wav(wav, SAMPLE_RATE))


def dnsmos_scorer():
    """-> function wav -> {"DNSMOS": P.835 overall, "DNSMOS P.808"}."""
    from speechmos import dnsmos

    def score(wav):
        found = dnsmos.run(np.clip(wav, -1, 1), SAMPLE_RATE)
        return {"DNSMOS": float(found["ovrl_mos"]), "DNSMOS P.808": float(found["p808_mos"])}
    return score


def utmos_scorer(path):
    """-> function wav -> {"UTMOS"}, by a TorchScript file, which is code: only from people you trust."""
    model = torch.jit.load(path, map_location="cpu").eval()

    @torch.no_grad()
    def score(wav):
        return {"UTMOS": float(model.score(torch.from_numpy(wav)))}
    return score


def pitch_meter():
    """-> function wav -> {"pitch, Hz", "pitch spread, semitones"} of its louder half."""
    import librosa

    def measure(wav):
        f0 = librosa.yin(wav, fmin=60, fmax=500, sr=SAMPLE_RATE, frame_length=1024, hop_length=320)
        loud = librosa.feature.rms(y=wav, frame_length=1024, hop_length=320)[0][:len(f0)]
        f0 = f0[:len(loud)][loud >= np.median(loud)]
        return {"pitch, Hz": float(np.median(f0)), "pitch spread, semitones": float(np.std(12 * np.log2(f0)))}
    return measure


def load(measure, package, missing, make, *arguments):
    """make(*arguments), or None, and how to get what lacks in missing[measure]."""
    try:
        return make(*arguments)
    except ImportError:
        missing[measure] = PIP[package]
    except (OSError, ValueError, RuntimeError) as problem:
        missing[measure] = str(problem).splitlines()[0]
    return None


def measure_voices(groups, prompts, embed=None, meters=()):
    """groups {name: ([wav (n,)], [text])}, prompts [wav], meters [function wav -> {measure: value}] ->
    {name: {measure: (mean, low, high)}}, and items of the first group (results.keep_results)."""
    anchors = [embed(wav) for wav in prompts] if embed else []
    results, items = {}, {}
    for name, (wavs, texts) in groups.items():
        rows = []
        for k, wav in enumerate(tqdm(wavs, name, mininterval=2)):
            seconds = len(wav) / SAMPLE_RATE
            row = {"seconds": seconds, "letters a second": len(texts[k].replace(" ", "")) / max(0.1, seconds)}
            if embed:
                row["similarity"] = float(anchors[k] @ embed(wav))
            for meter in meters:
                row |= meter(wav)
            rows.append(row)
        results[name] = {measure: interval([row[measure] for row in rows]) for measure in rows[0]}
        items = items or {f"voice, {measure}": [[text, row[measure], 1] for text, row in zip(texts, rows)]
                          for measure in rows[0]}
    return results, items


def speak(speaker, dataset, n, seed=0):
    """n texts of the dataset in the voice of another utterance of the same speaker -> prompts [wav], groups
    as of `measure_voices`, and which ended by themselves [bool]."""
    paired = dataset.paired()
    chosen, who = [i for [i] in pick_utterances(dataset, n)], dataset.index[paired, 4]
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    prompts = [dataset.draw_prompt(i, speaker.config.prompt_len, rng) for i in chosen]
    strangers = [int(rng.choice(paired[who != dataset.index[i, 4]])) for i in chosen]
    texts, theirs = ([dataset.info["text"][i] for i in some] for some in (chosen, strangers))
    given = prompts if synthesis_task(speaker.config) == "tts" else [None] * len(chosen)
    spoken = speaker.synthesise(texts, given, generator)
    decode = lambda group: [speaker.decode(codes) for codes in group]
    groups = {"the model": (decode([codes for codes, _ in spoken]), texts),
              "recordings, tokenized": (decode([dataset[i][0] for i in chosen]), texts),
              "another speaker": (decode([dataset[i][0] for i in strangers]), theirs)}
    return decode(prompts), groups, [ended for _, ended in spoken]


def write_versa(folder, prompts, groups):
    """wavs, and the lists "id path" and "id text" that VERSA's scorer takes."""
    os.makedirs(folder, exist_ok=True)
    wavs, texts = groups["the model"]
    kinds = {"wav": wavs, "prompt": prompts, "original": groups["recordings, tokenized"][0]}
    for kind, wavs in kinds.items():
        for k, wav in enumerate(wavs):
            soundfile.write(f"{folder}/{k:04d}.{kind}.wav", wav, SAMPLE_RATE)
        with open(f"{folder}/{kind}.scp", "w") as f:
            f.writelines(f"{k:04d} {os.path.abspath(folder)}/{k:04d}.{kind}.wav\n" for k in range(len(wavs)))
    with open(f"{folder}/text", "w", encoding="utf-8") as f:
        f.writelines(f"{k:04d} {text}\n" for k, text in enumerate(texts))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, help="texts (default: 40)")
    parser.add_argument("--data", help="folder of prepared data (default: those of the training)")
    parser.add_argument("--speaker_model", help="folder of an x-vector model instead of resemblyzer")
    parser.add_argument("--utmos", metavar="FILE", help="UTMOS as TorchScript")
    parser.add_argument("--guidance", type=float, help="of synthesis (default: as in the configuration)")
    parser.add_argument("--quant", default="", help="int8: faster decoding on a CPU")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    args = parser.parse_args(arguments)
    speaker = Speaker(args.run, quant=args.quant, dtype=args.dtype)
    if args.guidance is not None:
        speaker.config = replace(speaker.config, guidance=args.guidance)
    data, c = find_data(speaker, args.data), speaker.config
    splits = [Dataset(data, split, token_streams=c.token_streams) for split in ("unseen", "seen")]
    dataset = next((split for split in splits if len(set(split.index[split.paired(), 4])) > 1), None)
    if dataset is None:
        raise ValueError(f"{data} has no held-out utterances of two speakers")
    dataset.vocab = same_vocab(dataset.vocab, speaker.vocab, speaker.run)
    prompts, groups, ended = speak(speaker, dataset, 40 if args.n is None else args.n)
    write_versa(f"{speaker.run}/voices", prompts, groups)
    missing = {}
    embed = load("similarity", "transformers" if args.speaker_model else "resemblyzer", missing,
                 speaker_embedder, args.speaker_model)
    meters = [load("DNSMOS", "speechmos", missing, dnsmos_scorer),
              load("pitch", "librosa", missing, pitch_meter)]
    if args.utmos:
        meters.append(load("UTMOS", "", missing, utmos_scorer, args.utmos))
    results, items = measure_voices(groups, prompts, embed, [meter for meter in meters if meter])
    share = interval(ended)
    for name, measures in results.items():
        print(f"{name}: " + ", ".join(f"{measure} {mean:.2f} ({low:.2f} to {high:.2f})"
                                      for measure, (mean, low, high) in measures.items()))
    for measure, how in missing.items():
        print(f"{measure}: not available: {how}")
    print("{} texts, {:.0f} % ({:.0f} to {:.0f}) ended by themselves; ".format(
        len(prompts), *(100 * x for x in share)) + f"wavs and VERSA's lists in {speaker.run}/voices")
    ending = file_ending(speaker.checkpoint, args.data, args.n, guidance=args.guidance, quant=args.quant)
    keep_results(speaker.run, ending, {"voice": results | {
        "n": len(prompts), "ended": share, "step": speaker.state["step"], "not_available": missing}}, items)
    return 3 if missing else 0


if __name__ == "__main__":
    run_script(main)
