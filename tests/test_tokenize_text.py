"""Claim: text comes back as it was, whatever its script, and a tokenizer that is not there is explained."""
import pytest
import torch
from conftest import shared_folder

from tokenize_text import TextTokenizer, find_folder, make_text_tokenizer


def test_text_of_any_script_comes_back(tmp_path, request):
    """Tokenizers of our own, and the real one of SmolLM2 where it is, return any Unicode text as it was."""
    random_text = "".join(chr(i) for i in torch.randint(32, 0xd7ff, (300,)).tolist() if i != 0x2581)
    texts = ["one two", " one", "one  two ", "", "\n\ta", "na\u00efve \u65e5\u672c\u8a9e \U0001f600",
             "\ufb01\u00b2 e\u0301", "<|im_start|>x", "\x00", random_text]
    own = [make_text_tokenizer(["one two three four", "five six seven"] * 9, kind, size)
           for kind, size in (("bpe", 290), ("unigram", 290), ("char", 0))]
    for i, tokenizer in enumerate(own):
        tokenizer.save(str(tmp_path / f"{i}"))
        tokenizer = TextTokenizer.load(str(tmp_path / f"{i}"))
        assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    if shared_folder():
        real = TextTokenizer.load(request.getfixturevalue("smollm2"))
        assert [real.decode(real.encode(text)) for text in texts] == texts and real.n_text == 49152


def test_a_hub_id_without_the_hub_names_the_files(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="needed are config.json, tokenizer.json"):
        find_folder("nobody/nothing", ["config.json", "tokenizer.json"])


def test_an_llms_tokenizer_with_few_merges_makes_short_tokens_of_the_same_ids(smollm2):
    whole, short = (make_text_tokenizer([], smollm2, n) for n in (0, 600))
    text = "the amazing meeting in the shadows"
    assert whole.decode(whole.encode(text)) == short.decode(short.encode(text)) == text
    assert len(whole.encode(text)) < len(short.encode(text)) < len(text)
    assert short.n_text == whole.n_text
    assert whole.decode(short.encode("the")) == "the", "the ids are those of the LLM"
