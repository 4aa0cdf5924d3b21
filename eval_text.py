"""Evaluate text: what a model still knows of it, by perplexity and multiple choice, from files.

Helper of eval.py:
  python eval_text.py out/mine --text=page.txt --choices=arc_easy.jsonl
  python eval_text.py out/mine --choices=mmlu_test.jsonl --shots=mmlu_dev.jsonl --n=200
  python eval_text.py out/mine --before=smollm2 --text=page.txt      the base LLM that it came from beside it
A line of jsonl is {"question", "choices", "gold": number of the right one}. Where it has a "subject" too we
ask as MMLU does: five answered examples of the subject before it, letters as answers. Else each choice is
an answer in words, after "Question: ... Answer:", as ARC has it, or, of files that are --endings, right after
the question, as lm-evaluation-harness has OpenBookQA and HellaSwag. The likeliest wins, as it is (acc) or by
its bytes (acc_norm).
The hub's own versions, asked by lm-evaluation-harness: lm_eval_model.py.
"""
import argparse
import dataclasses
import json
import math
import os

import torch
from tqdm import tqdm

from checkpoint import starting_weights
from heads import stream_logits
from interleave import EOS, text_frames
from parallel import empty_model
from results import file_ending, keep_results
from script import run_script
from speaker import Speaker
from tokenize_text import TOKENIZER_FILES, TextTokenizer, find_folder
from wer import interval

SHOTS, WINDOW, BATCH = 5, 1024, 2048        # examples before an MMLU question; tokens of a text; of a batch
PIECE = 100                                 # tokens that a bootstrap draws together


def log_probabilities(model, vocab, documents):
    """[(ids, n)] -> [(n,)] log probabilities of the last n ids of each document, given what is before."""
    return [found for found, _ in predictions(model, vocab, documents)]


@torch.no_grad()
def predictions(model, vocab, documents):
    """[(ids, n)], 0 < n < len(ids) -> [(log probabilities (n,), greedy (n,))] of the last n ids of each.

    Log probabilities are among texts that go on; greedy: no other id, nor the end, is likelier, so that
    greedy decoding takes this one. Documents that differ in their last id alone, as the letters after an
    MMLU question do, are read once.
    """
    same, results = {}, {}
    for k, (ids, _) in enumerate(documents):
        same.setdefault(tuple(ids[:-1]), []).append(k)
    order = sorted(same, key=len)
    with tqdm(total=len(order), desc="reading", mininterval=2, disable=len(order) < 50) as bar:
        while order:
            group, size = [], 0
            while order and (not group or size + len(order[-1]) <= BATCH):
                group.append(order.pop())
                size += len(group[-1])
            lengths = [len(read) for read in group]
            hidden = model(torch.cat([text_frames(vocab, read) for read in group]), lengths)    # (S, D)
            for read, part in zip(group, hidden.split(lengths)):
                part = part[-max(documents[k][1] for k in same[read]):]                     # (most, D)
                logits = stream_logits(model, part, 0, slice(*vocab.text))                  # (most, n_text)
                best = torch.maximum(logits.amax(1), stream_logits(model, part, 0, [EOS])[:, 0])    # (most,)
                total = logits.logsumexp(1)                                                 # (most,)
                for k in same[read]:
                    ids, n = documents[k]
                    own = logits[-n:].gather(1, torch.tensor(ids[-n:])[:, None])[:, 0]      # (n,)
                    results[k] = own - total[-n:], own == best[-n:]
            bar.update(len(group))
    return [results[k] for k in range(len(documents))]


def windows(ids):
    """A long text's ids -> documents [(ids, n)] of at most WINDOW ids that predict each id but the first
    once, given at least half a window of what is before (where there is so much)."""
    documents = [(ids[:WINDOW], min(len(ids), WINDOW) - 1)] if len(ids) > 1 else []
    for start in range(WINDOW, len(ids), WINDOW // 2):
        end = min(start + WINDOW // 2, len(ids))
        documents.append((ids[end - WINDOW:end], end - start))
    return documents


def bits_per_byte(model, vocab, tokenizer, text):
    """How well a text is predicted, in windows of WINDOW tokens of which the second half counts: comparable
    between tokenizers, as perplexity is not. -> (bits per byte, low, high), (perplexity per token, low,
    high), 95 % intervals over pieces of PIECE tokens, and [[piece, its bits, its bytes]]."""
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError("the text is too short to be predicted")
    pieces = (-torch.cat(log_probabilities(model, vocab, windows(ids)))).split(PIECE)
    nats, tokens = [float(piece.sum()) for piece in pieces], [len(piece) for piece in pieces]
    each = len(tokenizer.decode(ids[1:]).encode()) / (len(ids) - 1)         # bytes a token
    items = [[k, x / math.log(2), n * each] for k, (x, n) in enumerate(zip(nats, tokens))]
    _, bits, n_byte = zip(*items)
    return interval(bits, n_byte), tuple(math.exp(x) for x in interval(nats, tokens)), items


def ask(row, shots):
    """A question -> context, answers: in words, or letters where it has a subject, after shots of that."""
    if "subject" not in row:
        context = row["question"] if row.get("ending") else f"Question: {row['question']}\nAnswer:"
        return context, [f" {choice}" for choice in row["choices"]]
    letters = "ABCDEFGHIJ"[:len(row["choices"])]

    def block(row):
        choices = [f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"])]
        return "\n".join([row["question"].strip(), *choices, "Answer:"])

    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    examples = [shot for shot in shots if shot.get("subject") == row["subject"]][:SHOTS]
    context = head + "".join(f"{block(shot)} {letters[shot['gold']]}\n\n" for shot in examples) + block(row)
    return context, [f" {letter}" for letter in letters]


def join(tokenizer, context, continuation):
    """-> (ids of both, n): the last n are the continuation's. After no context it starts from its own first
    token, which nothing predicts: n is one less."""
    ids, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    n = len(whole) - len(ids)
    if whole[:len(ids)] != ids or n < 1:                # the border fell inside a token
        after = tokenizer.encode(continuation)
        whole, n = ids + after, len(after)
    return whole, min(n, len(whole) - 1)


def choice_scores(model, vocab, tokenizer, rows, shots=()):
    """Log probability of each choice of each question, whole questions as they are -> [[float]]."""
    documents, counts = [], []
    for row in rows:
        context, choices = ask(row, shots)
        documents += [join(tokenizer, context, choice) for choice in choices]
        counts.append(len(choices))
    found = iter(log_probabilities(model, vocab, documents))
    return [[float(next(found).sum()) for _ in range(count)] for count in counts]


def multiple_choice(model, vocab, tokenizer, rows, shots=()):
    """-> {"acc": (share, low, high), "acc_norm": ..., "n"}, with 95 % intervals by bootstrap over questions,
    and [[question, 100 if that was right, 1]]."""
    right, right_norm = [], []
    for row, plain in zip(rows, choice_scores(model, vocab, tokenizer, rows, shots)):
        by_byte = [score / len(choice.strip().encode()) for score, choice in zip(plain, ask(row, ())[1])]
        right.append(float(plain.index(max(plain)) == row["gold"]))
        right_norm.append(float(by_byte.index(max(by_byte)) == row["gold"]))
    return ({"acc": interval(right), "acc_norm": interval(right_norm), "n": len(rows)},
            [[row["question"], 100 * found, 1] for row, found in zip(rows, right)])


def read_rows(path, limit=None):
    """Questions of a jsonl file, `limit` of them spread over it."""
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    wrong = [k for k, row in enumerate(rows, 1)
             if not isinstance(row, dict) or not {"question", "choices", "gold"} <= set(row)
             or not isinstance(row["gold"], int) or not 0 <= row["gold"] < len(row["choices"])
             or not all(isinstance(choice, str) and choice.strip() for choice in row["choices"])]
    if wrong or not rows:
        raise ValueError(f"{path}: line {wrong[0] if wrong else 1} is not a question with choices and gold")
    return rows[::max(1, len(rows) // limit)][:limit] if limit else rows


def base_model(speaker, folder):
    """The LLM that the speaker's model came from, in the same shape, and its own tokenizer."""
    config = dataclasses.replace(speaker.config, init_from=folder, rows_from_text=False)
    model = empty_model(config, speaker.vocab)
    starting_weights(config, speaker.vocab)(model)
    return model.eval().requires_grad_(False), TextTokenizer.load(find_folder(folder, TOKENIZER_FILES))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--before", help="folder or hub id of the base LLM, to stand beside it")
    parser.add_argument("--text", action="append", default=[], help="a file to be predicted")
    parser.add_argument("--choices", action="append", default=[], help="a jsonl file of questions")
    parser.add_argument("--endings", action="append", default=[], help="the same, answered without 'Answer:'")
    parser.add_argument("--shots", help="a jsonl file of MMLU's examples")
    parser.add_argument("--n", type=int, help="questions of each file (default: all)")
    args = parser.parse_args(arguments)
    speaker = Speaker(args.run)
    models = {args.run: (speaker.model, speaker.text_tokenizer)}
    missing = [path for path in (*args.text, *args.choices, *args.endings, args.shots)
               if path and not os.path.isfile(path)]
    for path in missing:
        print(f"{path}: not available: no such file; see --help for what it holds")
    try:
        if args.before:
            base, tokenizer = base_model(speaker, args.before)
            # a run with a small part of the LLM's merges is asked in the LLM's own spelling too
            models[f"{args.run}, whole vocabulary"] = speaker.model, tokenizer
            models[args.before] = base, tokenizer
    except (ValueError, OSError) as problem:
        missing.append(args.before)
        print(f"{args.before}: not available: {problem}")
    shots, results = read_rows(args.shots) if args.shots and args.shots not in missing else [], {}
    items = {}
    args.text, args.choices, args.endings = ([path for path in paths if path not in missing]
                                             for paths in (args.text, args.choices, args.endings))
    for name, (model, tokenizer) in models.items():
        result = results[name] = {}
        for path in args.text:
            with open(path, encoding="utf-8") as f:
                bits, perplexity, pieces = bits_per_byte(model, speaker.vocab, tokenizer, f.read())
            result[path] = {"bits a byte": bits, "perplexity": perplexity}
            if name == args.run:
                items[f"{path}, bits a byte"] = pieces
            print(f"{name}: {path}: " + "{:.3f} ({:.3f} to {:.3f}) bits a byte, perplexity ".format(*bits)
                  + "{:.1f} ({:.1f} to {:.1f})".format(*perplexity))
        for path in dict.fromkeys((*args.choices, *args.endings)):
            rows = [row | {"ending": path in args.endings} for row in read_rows(path, args.n)]
            if args.shots in missing and "subject" in rows[0]:
                print(f"{name}: {path}: not available: it is asked after examples, which are in --shots")
                continue
            found, answers = multiple_choice(model, speaker.vocab, tokenizer, rows, shots)
            result[path] = found
            if name == args.run:
                items[f"{path}, % right"] = answers
            print(f"{name}: {path}: " + ", ".join(
                "{} {:.1f} % ({:.1f} to {:.1f})".format(key, *(100 * x for x in found[key])) for key in (
                    "acc", "acc_norm")) + f", n={found['n']}", flush=True)
    if os.path.isdir(speaker.run):
        ending = file_ending(speaker.checkpoint, n=args.n)
        about = {"step": speaker.state.get("step"), "not_available": missing}
        keep_results(speaker.run, ending, {"text": results | about}, items)
    return 3 if missing else 0


if __name__ == "__main__":
    run_script(main)
