"""Evaluate: word error rates of recognition and synthesis, and teacher-forced perplexity per stream.

Sixteenth file of the reading order.
  python eval.py out/numbers                    rewrites out/numbers/results.json, wavs and curves
  python eval.py out/numbers --whisper=NAME     also lets Whisper judge the speech (pip install -e '.[eval]')
  python eval.py out/numbers --voice            whose voice it is, how natural, how fast (eval_voice.py)
  python eval.py out/mine --choices=mmlu.jsonl  what it knows of text (eval_text.py, whose flags these are)
  python eval.py out/numbers --plot out/b       curves of both runs in out/numbers/compare.png
  python eval.py out/numbers --compare=out/b    two evaluated runs, utterance by utterance
Flags that change what is measured, as --n or --beam, and other checkpoints and data, have files of their own.
Everything is measured on texts that no training utterance has; "unseen" are voices that training never heard.
Exit code 3: something was not available; the table says how to get it, and the rest of it stands.
Synthesis is judged on its sound: the wav is tokenized again and read by the model's own recogniser, which is
too kind, and by Whisper, where given, next to the original recordings, as they are and tokenized and decoded.
"""
import argparse
import importlib
import json
import math
import os
import re
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

import prepare
from checkpoint import same_vocab
from config import check_sampling, synthesis_task
from data import Dataset, Loader, prompt_frames
from heads import batch_loss, weighted_loss
from interleave import speech_frames, text_frames, training_example
from plot import plot_comparison, plot_curves, read_run
from results import compare, file_ending, keep_results
from script import run_script
from shards import write_file
from speaker import Speaker
from tokenize_audio import load_audio, save_audio
from wer import (
    capped_rate,
    comparable,
    error_report,
    interval,
    open_whisper,
    rated,
)

# ---- the parts ---------------------------------------------------------------------------------------------

def pick_utterances(dataset, limit, join=1):
    """What is tested: [[utterance, ...]], at most `limit` groups of `join` each, which are heard, or spoken,
    as one; all have speech and text. Alone they are drawn, always the same ones, as corpora come speaker by
    speaker, or speakers take turns; joined, each group is of one speaker, the first of each first."""
    if join < 1:
        raise ValueError(f"join={join}: one utterance is the least")
    paired, groups = dataset.paired(), []
    if join == 1:
        drawn = np.random.default_rng(0).permutation(len(paired))[:limit]
        return [[i] for i in np.sort(paired[drawn]).tolist()]
    for speaker in np.unique(dataset.index[paired, 4]):
        mine = paired[dataset.index[paired, 4] == speaker].tolist()
        groups += [(k, mine[k:k + join]) for k in range(0, len(mine) - join + 1, join)]
    return [group for _, group in sorted(groups)][:limit]


def evaluate_asr(speaker, dataset, groups, beam=1):
    """-> what error_report says, [(reference, hypothesis)]."""
    if not groups or not speaker.config.mixture.get("asr"):
        return {"wer": None, "n": 0}, []
    references = [" ".join(dataset.info["text"][i] for i in group) for group in groups]
    codes = [np.concatenate([dataset[i][0] for i in group]) for group in groups]
    hypotheses = speaker.transcribe(codes, beam=beam)
    return error_report(references, hypotheses) | {"n": len(groups)}, list(zip(references, hypotheses))


def draw_prompts(speaker, dataset, groups, rng):
    """For each group a voice prompt [codes (T, N)] from elsewhere; None for all if the model takes none."""
    c = speaker.config
    if synthesis_task(c) != "tts":
        return [None] * len(groups)
    return [dataset.draw_prompt(group[0], c.prompt_len, rng, group) for group in groups]


def evaluate_tts(speaker, dataset, groups, folder, whisper=None, best=1, seed=0):
    """Speak the texts of `groups`, prompted by another utterance of the speaker; have them read. best: and
    again by the best of so many samples, as its own ASR hears them. -> results, transcripts, and items of
    the model's own speech (results.keep_results)."""
    n, c = len(groups), speaker.config
    if n == 0 or not synthesis_task(c) or c.token_streams == "semantic":    # semantic tokens have no sound
        return {"own_asr": {"wer": None, "n": 0, "ended": None}, "whisper": None}, [], {}
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    references = [" ".join(dataset.info["text"][i] for i in group) for group in groups]
    prompts = draw_prompts(speaker, dataset, groups, rng)
    spoken = speaker.synthesise(references, prompts, generator)
    wavs = {"wer": [speaker.decode(codes) for codes, _ in spoken]}
    if best > 1:
        chosen, _ = speaker.synthesise_best(references, prompts, best, generator)
        wavs[f"best_of_{best}"] = [speaker.decode(codes) for codes, _ in chosen]
    wavs["resynthesised"] = [speaker.decode(np.concatenate([dataset[i][0] for i in group]))
                             for group in groups]                           # originals, as tokenized
    read = {name: speaker.transcribe([speaker.encode(pad_short(wav)) for wav in some])
            for name, some in wavs.items()} if c.mixture.get("asr") else {}
    own, judged = {"wer": None, "n": n}, None
    own["ended"], *own["ended_interval"] = interval([ended for _, ended in spoken])
    items = {"TTS, ended by itself, %": [[text, 100 * ended, 1]
                                         for text, (_, ended) in zip(references, spoken)]}
    for name, heard in read.items():
        own |= capped_rate(name, references, heard)
        if name != "resynthesised":
            items[f"TTS {name} by own ASR, capped, %"] = rated(references, heard, cap=True)
    if whisper:
        judged = {"n": n}
        paths = [[dataset.info["audio"][i] for i in group] for group in groups]
        if all(os.path.exists(path) for group in paths for path in group):      # data from elsewhere: without
            wavs["original"] = [np.concatenate([load_audio(path) for path in group]) for group in paths]
        for name, some in wavs.items():
            pairs = list(zip(*(comparable(text, whisper.hear(wav)) for wav, text in zip(
                tqdm(some, f"Whisper: {name}", n, mininterval=2), references))))
            judged |= capped_rate(name, *pairs)
            if name not in ("resynthesised", "original"):
                items[f"TTS {name} by Whisper, capped, %"] = rated(*pairs, cap=True)
    os.makedirs(folder, exist_ok=True)
    for i in range(min(4, n)):
        said = re.sub(r"[^\w-]+", "_", references[i])[:60]
        save_audio(f"{folder}/{i}_{said}.model.wav", wavs["wer"][i])
        save_audio(f"{folder}/{i}_{said}.original.wav", wavs["resynthesised"][i])
    return {"own_asr": own, "whisper": judged}, list(zip(references, read.get("wer", ()))), items


def pad_short(wav):
    """Speech too short to tokenize (the model ended at once) gets silence behind it, to count as an error."""
    return np.pad(wav, (0, max(0, 1600 - len(wav))))


@torch.no_grad()
def perplexities(speaker, dataset, n_row=16):
    """exp of the mean teacher-forced loss of each kind of token in each task that the model learned, counted
    where it learns -> {"asr text": [perplexity, low, high]}, intervals over rows of examples, and items."""
    found, items, c = {}, {}, speaker.config
    for task in (task for task, share in c.mixture.items() if share > 0 and len(dataset.able(task))):
        loader = Loader(dataset, replace(c, mixture={task: 1.0}, batch_rows=1, seed=0), held_out=True)
        reports = [batch_loss(speaker.model, loader.batch(row), c.softmax)[1] for row in range(n_row)]
        losses, counts = np.split(np.array(reports), 2, 1)                  # (n_row, kinds)
        for k, kind in enumerate(("text", "special", *loader.vocab.stream_names)):
            if counts[:, k].any():
                found[f"{task} {kind}"] = [math.exp(x) for x in interval(losses[:, k], counts[:, k])]
                items[f"{task} {kind}, nats"] = list(zip(range(n_row), losses[:, k], counts[:, k]))
    return found, items


@torch.no_grad()
def listening(speaker, dataset, task, n=40):
    """Does the model heed what it is given? asr: nats a word that transcripts cost it after their own speech
    and after another utterance's; tts, plain_tts: nats a frame that semantic tokens cost after their own text
    and another's -> {"own", "other", and their 95 % intervals}. As long as they are equal it hears, or reads,
    nothing."""
    groups, c, vocab, result = pick_utterances(dataset, n), speaker.config, speaker.vocab, {}
    if len(groups) < 2:
        return None
    hears, rng = task == "asr", np.random.default_rng(0)
    prompts = draw_prompts(speaker, dataset, groups, rng) if task == "tts" else []
    for name, others in (("own", groups), ("other", groups[1:] + groups[:1])):
        nats, counts = [], []
        for k, ([i], [other]) in enumerate(zip(groups, others)):
            codes, text_ids = dataset[other if hears else i][0], dataset[i if hears else other][1]
            entries = {"speech": speech_frames(vocab, codes, hears and c.semantic_asr),
                       "text": text_frames(vocab, text_ids)}
            if prompts:
                entries["prompt"] = prompt_frames(vocab, prompts[k], c.prompt_len)
            rows = training_example(vocab, task, entries, vocab.weights(), "target")
            tokens, targets, weight, modality = rows
            hidden = speaker.model(tokens, [len(tokens)])
            losses = weighted_loss(speaker.model, hidden, targets, weight, modality, c.softmax)[1]
            nats.append(float(losses[weight[:, 0] > 0, 0].sum()))
            counts.append(len(dataset.info["text"][i].split()) if hears else len(codes))
        result[name], *result[f"{name}_interval"] = interval(nats, counts)
    return result


def find_data(speaker, folder=None):
    """The prepared data to evaluate on: the folder named, else where the training's are or would be."""
    known = folder or speaker.state.get("data")
    if known and prepare.is_prepared(known):
        return known
    if not folder:
        settings = {name: getattr(speaker.config, name) for name in prepare.SETTINGS}
        try:
            place = prepare.data_folder(speaker.config.data_dir, settings)
            if prepare.is_prepared(place):
                return place
            known = f"{known} or {place}" if known else place
        except ValueError as problem:           # its corpus or tokenizer is not here, so not its data's name
            known = known or f"a folder whose name we can't tell ({problem})"
    raise ValueError(f"no prepared data at {known}: name them, --data=FOLDER")


def evaluate(run, whisper_folder=None, data=None, quant="", dtype="auto", best=1, n=None, join=1,
             guidance=None, beam=1):
    """Measure everything, write results.json, wavs and curves.png into the run's folder; returns results.
    n: utterances of each test, and guidance of synthesis, instead of what the run's configuration says.
    join: so many utterances of a speaker as one, long one. beam: recognition keeps so many hypotheses, and
    nothing else is measured. Of all that the files have other names (results.file_ending)."""
    began, speaker = time.time(), Speaker(run, quant=quant, dtype=dtype)
    run, c = speaker.run, speaker.config
    ending = file_ending(speaker.checkpoint, data, n, join, beam, guidance, quant)
    data = find_data(speaker, data)
    if n is not None:
        c.eval_utterances = c.tts_utterances = n
    c.guidance = c.guidance if guidance is None else guidance
    check_sampling(c)
    c.max_speech_s *= join
    seen, unseen = (Dataset(data, split, token_streams=c.token_streams) for split in ("seen", "unseen"))
    for dataset in (seen, unseen):
        dataset.vocab = same_vocab(dataset.vocab, speaker.vocab, run)
    results, transcripts, items, others = {"asr": {}}, {}, {}, beam == 1
    for name, dataset in (("seen", seen), ("unseen", unseen)):
        results["asr"][name], transcripts[f"asr_{name}"] = evaluate_asr(
            speaker, dataset, pick_utterances(dataset, c.eval_utterances, join), beam)
        if transcripts[f"asr_{name}"]:
            items[f"ASR WER, {name}, %"] = rated(*zip(*transcripts[f"asr_{name}"]))
    voices = unseen if len(unseen.paired()) else seen
    whisper, missing = open_whisper(whisper_folder) if whisper_folder else (None, None)
    groups = pick_utterances(voices, c.tts_utterances, join) if others else []
    results["tts"], transcripts["tts"], tts_items = evaluate_tts(
        speaker, voices, groups, f"{run}/wavs{ending}", whisper, best)
    results["not_available"] = {"TTS WER by Whisper": missing} if missing else {}
    heeds = [task for task in ("asr", synthesis_task(c)) if c.mixture.get(task) and others]
    results["listening"] = {task: listening(speaker, voices, task) for task in heeds}
    results["perplexity"], items = {}, items | tts_items
    for name, dataset in (("seen", seen), ("unseen", unseen)) if others else ():
        results["perplexity"][name], found = perplexities(speaker, dataset)
        items |= {f"{kind}, {name}": rows for kind, rows in found.items()}
    record = {"seconds": {}}
    if os.path.exists(f"{run}/run.json"):           # what train.py measured of itself
        with open(f"{run}/run.json") as f:
            record = json.load(f)
    results["seconds"] = {"prepare": record["seconds"].get("prepare"),
                          "train": record["seconds"].get("train", speaker.state["seconds"]),
                          "eval": time.time() - began}
    results["frames_per_second"] = speaker.state["frames"] / max(speaker.state["seconds"], 1e-9)
    results["peak_memory_mb"] = record.get("peak_memory_mb")
    results["parameters"] = sum(p.numel() for p in speaker.model.parameters())
    keep_results(run, ending, results, items, anew=True)
    write_file(f"{run}/transcripts{ending}.json", json.dumps(transcripts, indent=1))
    if ending in ("", f"_{speaker.checkpoint}"):
        note_error_rates(run, speaker.state, results)
        plot_curves(run)
    return results


def note_error_rates(run, state, results):
    """Keep WER of each checkpoint that was evaluated, in wer.jsonl, for the curves."""
    rates = {f"asr_{split}": found["wer"] for split, found in results["asr"].items()}
    rates["tts"] = results["tts"]["own_asr"]["wer"]
    row = {"step": state["step"], "frames": state["frames"], **rates}
    kept = [old for old in read_run(run)[1] if old["step"] != row["step"]]
    rows = sorted([*kept, row], key=lambda row: row["step"])
    write_file(f"{run}/wer.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def table(results):
    """The results as a few readable lines."""
    percent = lambda x: "  --  " if x is None else f"{x:5.1f} %"

    def capped(found, name):
        if found.get(name) is None:
            return "--"
        low, high = found[f"{name}_interval"]
        return f"{found[name]:.1f} % ({low:.1f} to {high:.1f})"

    asr, judged, whisper = results["asr"], results["tts"]["own_asr"], results["tts"]["whisper"]
    lines = [f"ASR WER, new texts   known voices {percent(asr['seen']['wer'])} (n={asr['seen']['n']})"
             f"   new voices {percent(asr['unseen']['wer'])} (n={asr['unseen']['n']})"]
    for name, found in asr.items():
        if found["n"]:
            low, high = found["wer_interval"]
            lines.append(f"  {name:6s} {low:.1f} to {high:.1f} %, CER {found['cer']:.1f} %; of "
                         f"{found['words']} words {found['substitutions']} wrong, {found['deletions']} "
                         f"missing, {found['insertions']} added")
            said, heard = found["worst"][0]
            lines.append(f"  worst: {said[:50]!r} heard as {heard[:50]!r}")
    if judged["n"]:
        lines.append("TTS, n={}, {:.0f} % ({:.0f} to {:.0f}) ended by themselves".format(
            judged["n"], *(100 * x for x in (judged["ended"], *judged["ended_interval"]))))
    for judge, found in (("own ASR", judged), ("Whisper", whisper or {"n": 0})):
        if found["n"]:
            best = [f"; {name.replace('_', ' ')} {capped(found, name)}" for name in found
                    if name.startswith("best_of") and not name.endswith("interval")]
            lines.append(f"TTS WER by {judge:9s} {capped(found, 'wer')}{''.join(best)}; originals as tokens "
                         f"{capped(found, 'resynthesised')}"
                         + (f", as they are {capped(found, 'original')}" if judge == "Whisper" else ""))
    lines += [f"{row}: not available: {how}" for row, how in results["not_available"].items()]
    for task, found in results["listening"].items():
        what, after = ("text, nats a word", "speech") if task == "asr" else ("semantic, a frame", "text")
        if found:
            own, other = ("{:.2f} ({:.2f} to {:.2f})".format(found[whose], *found[f"{whose}_interval"])
                          for whose in ("own", "other"))
            lines.append(f"{what:20s} {own} after its own {after}, {other} after another's")
    voices = next((name for name in ("unseen", "seen") if results["perplexity"].get(name)), None)
    found = results["perplexity"].get(voices, {})
    for task in dict.fromkeys(kind.split()[0] for kind in found):
        lines.append(f"perplexity, {voices}, {task}: " + "  ".join(
            f"{kind.removeprefix(task + ' ')} {p:.1f}±{(high - low) / 2:.1f}"
            for kind, (p, low, high) in found.items() if kind.startswith(task + " ")))
    return "\n".join(lines)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run, for instance out/numbers")
    parser.add_argument("--whisper", help="a Whisper of the hub, or its folder: see wer.py")
    parser.add_argument("--data", help="folder of prepared data (default: those of the training)")
    parser.add_argument("--n", type=int, help="utterances of each test (default: as in the configuration)")
    parser.add_argument("--join", type=int, default=1, help="so many utterances of a speaker as a long one")
    parser.add_argument("--beam", type=int, default=1, help="ASR: keep so many hypotheses (1: greedy)")
    parser.add_argument("--best", type=int, default=1, help="TTS again by the best of so many samples")
    parser.add_argument("--guidance", type=float, help="of synthesis (default: as in the configuration)")
    parser.add_argument("--voice", action="store_true", help="voice similarity, DNSMOS, pitch and rate too")
    for flag in ("--text", "--choices", "--endings"):
        parser.add_argument(flag, action="append", default=[], metavar="FILE", help="see eval_text.py")
    for flag in ("--shots", "--before"):
        parser.add_argument(flag, help="see eval_text.py")
    for flag in ("--speaker_model", "--utmos"):
        parser.add_argument(flag, help="see eval_voice.py; with it --voice need not be said")
    parser.add_argument("--compare", help="another evaluated run: only compare the two")
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="other runs: only draw their curves beside")
    parser.add_argument("--quant", default="", help="int8: faster decoding on a CPU")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    args = parser.parse_args(arguments)
    if (args.shots or args.before) and not (args.text or args.choices or args.endings):
        raise ValueError("--shots and --before go with --text, --choices or --endings")
    if args.plot:
        folder = args.run if os.path.isdir(args.run) else os.path.dirname(os.path.abspath(args.run))
        path = f"{folder}/compare.png"
        plot_comparison([args.run, *args.plot], path)
        print(path)
        return 0
    if args.compare:
        ways = ("data", "n", "join", "beam", "guidance", "quant")
        print(compare(args.run, args.compare, **{name: getattr(args, name) for name in ways}))
        return 0
    found = evaluate(args.run, args.whisper, args.data, args.quant, args.dtype, args.best, args.n,
                     args.join, args.guidance, args.beam)
    print(table(found))
    return max(3 if found["not_available"] else 0, *(further(script, args) for script in ("voice", "text")))


def further(script, args):
    """The rows of eval_voice.py or eval_text.py, where args ask for them -> exit code. Those files build on
    this one, so they are imported only now."""
    if script == "voice" and (args.voice or args.speaker_model or args.utmos):
        flags = {"--data": [args.data], "--n": [args.n], "--speaker_model": [args.speaker_model],
                 "--utmos": [args.utmos], "--guidance": [args.guidance], "--quant": [args.quant],
                 "--dtype": [args.dtype]}
    elif script == "text" and (args.text or args.choices or args.endings):
        flags = {"--text": args.text, "--choices": args.choices, "--endings": args.endings,
                 "--shots": [args.shots], "--before": [args.before], "--n": [args.n]}
    else:
        return 0
    given = [f"{flag}={value}" for flag, values in flags.items() for value in values if value is not None]
    return importlib.import_module(f"eval_{script}").main([args.run, *given])


if __name__ == "__main__":
    run_script(main)
