"""Claim: lm-evaluation-harness hears of a run just what eval_text.py finds, and what decoding would say."""
import importlib
import importlib.util
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_here

from eval_text import bits_per_byte, choice_scores
from interleave import EOS

CONTEXTS = ["seven three five", "one two", "four", "two hundred and six", "nine nine nine"]


def stand_in(monkeypatch):
    """As much of lm_eval as we use, for where it is not installed: its simple_evaluate asks the questions of
    the jsonl file that the task is, as lm_eval's multiple choice does."""
    def simple_evaluate(model, tasks, limit, num_fewshot, task_manager):
        right = []
        for row in [json.loads(line) for line in open(tasks[0])][:limit]:
            pairs = [(f"Question: {row['question']}\nAnswer:", f" {choice}") for choice in row["choices"]]
            scores = [total for total, _ in model.loglikelihood([SimpleNamespace(args=p) for p in pairs])]
            right.append(scores.index(max(scores)) == row["gold"])
        return {"results": {tasks[0]: {"acc": sum(right) / len(right)}}}

    parts = {"": {"simple_evaluate": simple_evaluate}, ".api": {}, ".api.model": {"LM": object},
             ".api.registry": {"register_model": lambda name: lambda kind: kind},
             ".tasks": {"TaskManager": lambda include_path: None},
             ".utils": {"make_table": lambda found: str(found["results"])}}
    for name, content in parts.items():
        module = ModuleType(f"lm_eval{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def model(tiny_run, monkeypatch):
    if not importlib.util.find_spec("lm_eval"):
        stand_in(monkeypatch)
    return importlib.import_module("lm_eval_model").NanoOpusLM(tiny_run, dtype="float32")


def ask(what, *requests):
    return what([SimpleNamespace(args=args) for args in requests])


def test_a_likelihood_is_the_score_that_eval_text_has(model):
    """Of endings whose border with the context is between two tokens and inside one."""
    rows = [{"question": "seven three", "choices": ["five", "nine nine", "four one six"], "gold": 0}]
    [expected] = choice_scores(model.model, model.vocab, model.text_tokenizer, rows)
    found = ask(model.loglikelihood, *[("Question: seven three\nAnswer:", f" {choice}")
                                       for choice in rows[0]["choices"]])
    assert [total for total, _ in found] == expected
    [(inside, _)] = ask(model.loglikelihood, ("sev", "en"))
    assert math.isfinite(inside) and inside < 0
    nothing = model.text_tokenizer.encode("one")[:1]
    assert ask(model.loglikelihood, ("", model.text_tokenizer.decode(nothing))) == [(0.0, True)], (
        "nothing predicts the first token of all")


def test_a_text_is_as_likely_as_its_bits_say(model):
    """Also where it is longer than one window; several are asked at once."""
    texts = ["seven three five one", "one two " * 700, "nine"]
    for text, nats in zip(texts, ask(model.loglikelihood_rolling, *[(text,) for text in texts])):
        if text == "nine" and len(model.text_tokenizer.encode(text)) == 1:
            assert nats == 0
            continue
        _, (perplexity, *_), _ = bits_per_byte(model.model, model.vocab, model.text_tokenizer, text)
        assert nats == pytest.approx(-math.log(perplexity) * (len(model.text_tokenizer.encode(text)) - 1))


def test_greedy_is_what_decoding_says_and_it_stops_where_told(model, monkeypatch):
    """Of all words after a context the one that generate_until says, or none where the text would end."""
    words = [model.text_tokenizer.decode([k]) for k in range(1, model.text_tokenizer.n_text)]
    rows = model.model.lm_head.data.clone()
    [second] = ask(model.generate_until, ("one two", {"max_gen_toks": 1}))
    likeliest = rows[model.vocab.text_start + model.text_tokenizer.encode(second)[0]]
    for end in (rows[EOS], 1.5 * likeliest):                # once more with an end that is likely after "two"
        monkeypatch.setattr(model.model.lm_head, "data", rows.index_fill(0, torch.tensor(EOS), 0))
        model.model.lm_head.data[EOS] = end
        model.model.decoding_heads.clear()                  # which hold the rows as they were
        for context in CONTEXTS:
            [answer] = ask(model.generate_until, (context, {"until": [], "max_gen_toks": 1}))
            found = ask(model.loglikelihood, *[(context, f" {word}") for word in words])
            greedy = [f" {word}" for word, (_, greedy) in zip(words, found) if greedy]
            assert greedy == ([answer] if answer else [])
    assert ask(model.generate_until, ("one two", {})) == [""], "the end is likelier now"


def test_an_answer_is_greedy_as_a_whole_and_stops_where_told(model):
    for context in CONTEXTS:
        [answer] = ask(model.generate_until, (context, {"max_gen_toks": 6}))
        *most, last = answer.split()
        assert ask(model.loglikelihood, (context, answer))[0][1]
        other = " ".join(["", *most, "one" if last != "one" else "two"])
        assert not ask(model.loglikelihood, (context, other))[0][1]
        for until in (f" {last}", ["nowhere", f" {last}"]):
            [cut] = ask(model.generate_until, (context, {"until": until, "max_gen_toks": 6}))
            assert cut == answer[:answer.index(f" {last}")]
    with pytest.raises(ValueError, match="do_sample"):
        ask(model.generate_until, ("one", {"do_sample": True}))


def test_the_command_asks_and_prints_a_table_or_says_what_is_missing(tiny_run, tmp_path, monkeypatch):
    rows = [{"question": "seven", "choices": ["one", "two", "four five six"], "gold": k} for k in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stand_in(monkeypatch)
    command = ROOT / "lm_eval_model.py", tiny_run, f"--tasks={tmp_path}/q.jsonl"
    code, out, err = run_here(*command)
    assert code == 0 and "'acc': 0.333" in out, err         # one and the same choice wins three times
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = run_here(*command)
    assert code == 3 and "not available: pip install -e '.[lm-eval]'" in out
