"""Text tokens: the tokenizer of a base LLM, or a small one of our own.

Helper of prepare.py in the reading order; it imports nothing of ours. A base LLM brings its tokenizer.json,
and its embedding rows only mean something with that. A model from scratch is better off with a
sentencepiece vocabulary trained on its own transcripts.
"""
import io
import json
import os
import re

import sentencepiece
import tokenizers

KINDS = ("word", "bpe", "unigram", "char")
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def find_folder(name, files):
    """A folder, or the id of a model on the Hugging Face hub, which is downloaded -> the folder.

    files: names or patterns of what is needed of it. ValueError says how else to come by them.
    """
    if os.path.isdir(name):
        return name
    reason = "no such folder"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            from huggingface_hub import snapshot_download
            return snapshot_download(name, allow_patterns=list(files))
        except ImportError:
            reason = "no such folder; to download it from the hub, pip install -e '.[hub]'"
        except Exception as error:          # no network, no such model, no permission: the hub has many
            reason = f"no such folder, and no download from the hub ({type(error).__name__})"
    raise ValueError(f"{name}: {reason}; needed are {', '.join(files)}, in a folder that you name here")


class TextTokenizer:
    """encode, decode, save, load and n_text, the number of embedding rows it needs.

    Any text comes back as it was, byte for byte, from a base LLM's tokenizer and from our own bpe, unigram
    and char ones (but U+2581, which sentencepiece takes for a space). Word tokenizers only know their
    words.
    """

    def __init__(self, files):
        """files: {name: bytes}, text.model of sentencepiece, or tokenizer.json and what stood beside it."""
        self.files = files
        if "text.model" in files:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=files["text.model"])
            self.n_text = self.model.vocab_size()
            return
        try:
            self.model = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:          # the library raises bare Exception
            raise ValueError(f"tokenizer.json can't be read: {error}") from None
        size = self.model.get_vocab_size()
        self.n_text = json.loads(files["config.json"])["vocab_size"] if "config.json" in files else size
        if self.n_text < size:
            raise ValueError(f"tokenizer.json has {size} tokens, but the model of config.json has rows for "
                             f"{self.n_text}: they do not belong together")

    def encode(self, text):
        """str -> [id], without begin or end tokens."""
        if "text.model" in self.files:
            return self.model.encode(text)
        return self.model.encode(text, add_special_tokens=False).ids

    def separator(self):
        """[id] to put between two texts that are joined; sentencepiece begins each word with its space."""
        return [] if "text.model" in self.files else self.encode(" ")

    def decode(self, ids):
        """[id] -> str."""
        ids = [int(i) for i in ids]
        if "text.model" in self.files:
            return self.model.decode(ids)
        return self.model.decode(ids, skip_special_tokens=False)

    def save(self, folder):
        """Write the files beside, then rename the folder: it is never there in part."""
        os.makedirs(folder + ".tmp", exist_ok=True)
        for name, content in self.files.items():
            with open(f"{folder}.tmp/{name}", "wb") as f:
                f.write(content)
        os.replace(folder + ".tmp", folder)

    @classmethod
    def load(cls, folder):
        names = [name for name in ("text.model", *TOKENIZER_FILES) if os.path.isfile(f"{folder}/{name}")]
        if "text.model" not in names and "tokenizer.json" not in names:
            raise ValueError(f"{folder} holds no text tokenizer: neither text.model nor tokenizer.json")
        return cls({name: open(f"{folder}/{name}", "rb").read() for name in names})


def small_pieces(tokenizer, n_merge):
    """An LLM's tokenizer that only makes short tokens: the first n_merge merges of its BPE, the same ids.

    With few transcripts most long tokens never occur; short ones do, and the LLM knows them too.
    """
    if "text.model" in tokenizer.files:
        raise ValueError("text_vocab picks merges of an LLM's BPE; a tokenizer of our own has its size: "
                         "--text_vocab=0")
    about = json.loads(tokenizer.files["tokenizer.json"])
    if about["model"].get("type") != "BPE":
        raise ValueError(f"text_vocab picks merges of a BPE, this is a {about['model'].get('type')} model")
    about["model"]["merges"] = about["model"]["merges"][:n_merge]
    return TextTokenizer(tokenizer.files | {"tokenizer.json": json.dumps(about).encode()})


def make_text_tokenizer(texts, kind, size):
    """Train a sentencepiece model of these texts, or take the one of a base LLM.

    kind: "word", "bpe", "unigram", "char", the folder or hub id of an LLM, or the folder of a tokenizer that
    was trained so before.  size: tokens; 0 = as many as the texts have (word and char); for an LLM only the
    first so many merges of its BPE, 0 = all. Token 0 of our own ones is the unknown one; there are no begin,
    end and pad tokens.
    """
    if kind not in KINDS:
        if not os.path.isdir(kind) and "/" not in kind:
            raise ValueError(f"text_model {kind!r} is not one of {', '.join(KINDS)}, nor a base LLM's folder")
        tokenizer = TextTokenizer.load(find_folder(kind, TOKENIZER_FILES))
        return small_pieces(tokenizer, size) if size else tokenizer
    exact = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
    if size == 0:
        if kind not in ("word", "char"):
            raise ValueError(f"text_model {kind!r} needs a size, for instance --text_vocab=1000")
        pieces = {piece for text in texts for piece in (text.split() if kind == "word" else text)}
        size = 1 + len(pieces | {" "}) + 256 if kind == "char" else 1 + len(pieces)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=size, unk_id=0,
            bos_id=-1, eos_id=-1, pad_id=-1, character_coverage=1.0, hard_vocab_limit=False, num_threads=1,
            minloglevel=2, **({} if kind == "word" else exact))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"sentencepiece could not train a {kind} model of {size} tokens ({error}); "
                         "bpe, unigram and char need 257 besides one for each letter") from None
    return TextTokenizer({"text.model": model.getvalue()})
