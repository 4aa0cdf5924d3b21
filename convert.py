"""Convert: the weights of text LLMs and of published OpusLM checkpoints in, plain text LLMs out.

Helper of checkpoint.py in the reading order. What `init_from` of config.py may name:
  a base LLM             Hugging Face folder or hub id: config.json, *.safetensors, tokenizer.json
  a published OpusLM     ESPnet's folder: model.pth, config.yaml
  a run of ours          see checkpoint.py
Everything is read tensor by tensor, so that loading needs little more memory than the model. What does not
fit is a ValueError that names each tensor or field, found before anything is filled in.
"""
import json
import math
import os
import pickle
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interleave import N_SPECIAL, SPECIAL, Vocab
from model import Model, ModelConfig, body_name, misfits, published_tensors, published_weights, some
from tokenize_text import TOKENIZER_FILES, find_folder

LLM_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES[1:])
OPUSLM_FILES = ("model.pth", "config.yaml")
HF_FIELDS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "d_model": "hidden_size",
             "n_kv_head": "num_key_value_heads", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
             "rope_theta": "rope_theta", "model_type": "model_type"}
KNOWN_BODIES = {    # (n_layer, d_model): the rest, of the LLMs under the published checkpoints
    (30, 576): dict(n_head=9, n_kv_head=3, d_ff=1536, rope_theta=1e5, norm_eps=1e-5, model_type="llama"),
    (32, 960): dict(n_head=15, n_kv_head=5, d_ff=2560, rope_theta=1e5, norm_eps=1e-5, model_type="llama"),
    (24, 2048): dict(n_head=32, n_kv_head=32, d_ff=8192, rope_theta=1.3e5, norm_eps=1e-5, model_type="llama"),
    (32, 4096): dict(n_head=32, n_kv_head=32, d_ff=11008, rope_theta=5e5, norm_eps=1e-6, model_type="olmo2"),
}


# ---- Hugging Face folders ----------------------------------------------------------------------------------

def read_body(folder):
    """config.json of a Llama or OLMo-2 -> {our field: value}, with vocab_size and tied."""
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no config.json: a base LLM's folder has one, with model.safetensors "
                         "and tokenizer.json")
    try:
        with open(path) as f:
            theirs = json.load(f)
    except ValueError as error:
        raise ValueError(f"{path} is not valid json: {error}") from None
    if theirs.get("model_type") not in ("llama", "olmo2"):
        raise ValueError(f"{path}: model_type is {theirs.get('model_type')!r}, we have llama and olmo2")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theirs.setdefault("rope_theta", rope.get("rope_theta", 1e4))
    theirs.setdefault("num_key_value_heads", theirs.get("num_attention_heads"))
    missing = [name for name in [*HF_FIELDS.values(), "vocab_size"] if theirs.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": head_dim}
    ours = {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    ours |= {name: theirs[name] for name in only if theirs.get(name) is not None}
    other = [f"{name} is {ours[name]!r}, we have {value!r}" for name, value in
             (only | {"rope_type": "default"}).items() if name in ours and ours[name] != value]
    if other:
        raise ValueError(f"{path}: {some(other)}")
    body = {name: type(getattr(ModelConfig, name))(theirs[field]) for name, field in HF_FIELDS.items()}
    return body | {"vocab_size": theirs["vocab_size"], "tied": bool(theirs.get("tie_word_embeddings"))}


def list_tensors(folder):
    """Every tensor of a folder's safetensors -> {name: (path, shape)}, from the headers alone."""
    index, files = f"{folder}/model.safetensors.index.json", ["model.safetensors"]
    if os.path.isfile(index):
        with open(index) as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    lost = [name for name in files if not os.path.isfile(f"{folder}/{name}")]
    if lost:
        raise ValueError(f"{folder} lacks {some(lost)}: not all of it was downloaded (we read safetensors)")
    found = {}
    for path in (f"{folder}/{name}" for name in files):
        try:
            with safe_open(path, "pt") as f:
                found |= {name: (path, tuple(f.get_slice(name).get_shape())) for name in f.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut off ({error}): copy or download it again") from None
    return found


def read_tensor(path, name):
    """One tensor. The file is opened for it alone: an open one keeps every page that was read in memory."""
    with safe_open(path, "pt") as f:
        return f.get_tensor(name)


def base_weights(folder, config, vocab, seed, said=None, centroids=None):
    """A Hugging Face LLM as the weights of our Model -> {our name: function that reads it}.

    Text rows of emb and lm_head are the LLM's input and output table (a tied LLM fills both). New rows of emb
    get the spread of that table, those of lm_head a tenth of it: of full size they would predict speech with
    such confidence that it costs 20 nats a token at first, where ignorance costs 7. NOTE(espnet): it passes
    the table's variance as the standard deviation, so that new rows start about 25 times smaller.

    said (n_semantic, n_text): share of each text token in what is said while a semantic token is active
    (align.py), and centroids (n_semantic, C): what it sounds like. A semantic row of emb is then the mean of
    those text rows and a random projection of its centroid, as much of each: the LLM understands something of
    speech before it has seen any, and clusters that sound alike, which other voices fall into, look alike to
    it. Acoustic rows start
    at a tenth of the spread then: eight of full size would drown the semantic row in a frame's sum. (At zero,
    frames with nothing else in them get gradients without bound from the first norm.)
    """
    body = read_body(folder)
    wrong = [f"{name} is {body[name]} there, {getattr(config, name)} here" for name in HF_FIELDS
             if body[name] != getattr(config, name) and (isinstance(body[name], str) or not math.isclose(
                 body[name], getattr(config, name), rel_tol=1e-6))]
    if body["vocab_size"] != vocab.n_text:
        wrong.append(f"the LLM has {body['vocab_size']} text tokens, the prepared data have {vocab.n_text} "
                     f"(prepare them with --text_model={folder})")
    if wrong:
        raise ValueError(f"{folder} does not fit the configuration: {some(wrong)}")
    found, table = list_tensors(folder), "model.embed_tokens.weight"
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Model(config).named_parameters()}
    sources = {name: f"model.{body_name(name)}" for name in shapes if name.startswith(("blocks.", "norm."))}
    tables = {"emb": table, "lm_head": table if body["tied"] else "lm_head.weight"}
    expected = {theirs: shapes[name] for name, theirs in sources.items()}
    expected |= {theirs: (vocab.n_text, config.d_model) for theirs in tables.values()}
    wrong = misfits({name: shape for name, (_, shape) in found.items()      # but what a Llama may repeat
                     if not name.endswith("rotary_emb.inv_freq")
                     and not (body["tied"] and name == "lm_head.weight")}, expected)
    if wrong:
        raise ValueError(f"{folder}: {some(wrong)}")
    generator = torch.Generator().manual_seed(seed)

    def joint(name, theirs):
        text = read_tensor(found[theirs][0], theirs).float()                # (n_text, D)
        rows = torch.empty(config.vocab_size, config.d_model)
        rows.normal_(0, text.std().item() * (0.1 if name == "lm_head" else 1), generator=generator)
        if said is not None and name == "emb":
            start, end = config.streams[0]
            centred = centroids - centroids.mean(0)                         # (n_semantic, C)
            sound = centred @ torch.randn(centred.shape[1], rows.shape[1], generator=generator)
            heard = torch.from_numpy(said) @ text                           # (n_semantic, D)
            mixed = heard / heard.std() + sound / sound.std()
            rows[start:end] = mixed * (text.std() / mixed.std())
            for start, end in config.streams[1:]:
                rows[start:end] *= 0.1
        rows[slice(*config.text)] = text
        rows[0] = 0             # pad: adds nothing to a frame's sum, and is never predicted
        return rows

    weights = {name: (lambda theirs=theirs: read_tensor(found[theirs][0], theirs))
               for name, theirs in sources.items()}
    weights |= {name: (lambda name=name, theirs=theirs: joint(name, theirs))
                for name, theirs in tables.items()}
    return weights | {"head_emb": lambda: torch.zeros(shapes["head_emb"])}


def export_text(model, folder):
    """Write the body and the text rows as a plain LlamaForCausalLM or Olmo2ForCausalLM for `transformers`.

    Returns the largest difference that leaving out stream 0's head_emb makes to a logit: 0 but for published
    checkpoints (see heads.stream_logits), whose bias has no place in a plain LLM.
    """
    c, text = model.config, slice(*model.config.text)
    weights = {f"model.{body_name(name)}": p for name, p in model.named_parameters()
               if name.startswith(("blocks.", "norm."))}
    weights |= {"model.embed_tokens.weight": model.emb[text], "lm_head.weight": model.lm_head[text]}
    save_file({name: p.detach().cpu().contiguous().clone() for name, p in weights.items()},
              f"{folder}/model.safetensors", {"format": "pt"})
    config = {theirs: asdict(c)[name] for name, theirs in HF_FIELDS.items()}
    config |= {"architectures": [{"llama": "LlamaForCausalLM", "olmo2": "Olmo2ForCausalLM"}[c.model_type]],
               "vocab_size": text.stop - text.start, "hidden_act": "silu", "tie_word_embeddings": False,
               "max_position_embeddings": {"llama": 8192, "olmo2": 4096}[c.model_type],
               "torch_dtype": "float32"}
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f, indent=1)
    return float((model.lm_head[text] @ model.head_emb[0]).abs().max()) if c.published else 0.0


# ---- published OpusLM checkpoints --------------------------------------------------------------------------

def is_published(folder):
    return all(os.path.isfile(f"{folder}/{name}") for name in OPUSLM_FILES)


def read_yaml(folder):
    try:
        import yaml
    except ImportError:
        raise ValueError("reading config.yaml needs PyYAML: pip install -e '.[hub]'") from None
    path = f"{folder}/config.yaml"
    try:
        with open(path, encoding="utf-8") as f:
            about = yaml.load(f, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        missing = [name for name in ("token_list", "token_bias") if name not in about]
    except (yaml.YAMLError, TypeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not readable as ESPnet's config.yaml: {reason}") from None
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: is it the config.yaml of an OpusLM checkpoint?")
    return about


def read_pickle(path):
    """The tensors of a torch.save file, mapped into memory; a pickle that holds code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is cut off, or holds code, which we do not run ({reason})") from None


def published_layout(folder, about):
    """config.yaml -> (Vocab, (V,) their row of each of our ids, token_bias).

    Ids go by name: special tokens and blocks of codes that stand elsewhere in token_list are moved to where
    our vocabulary has them, which changes nothing but the numbers.
    """
    place = {name: i for i, name in enumerate(about["token_list"])}
    bias = {name: tuple(interval) for name, interval in about["token_bias"].items()}
    if "codec_ssl" in bias and "ssl" not in bias:       # the joint list of older files: ssl first
        codec = place["<codec_layer0_code0>"]
        bias |= {"ssl": (bias["codec_ssl"][0], codec), "codec": (codec, bias["codec_ssl"][1])}
    lacks = [name for name in ("ssl", "codec", "text_bpe") if name not in bias]
    lacks += [name for name in ("<sos/eos>", "<codec_ssl_start>", "<text_bpe_start>") if name not in place]
    if lacks or about.get("codec_token_per_frame", 9) != 9:
        raise ValueError(f"{folder}/config.yaml is not OpusLM's: " + (
            f"no {some(lacks)}" if lacks else f"{about['codec_token_per_frame']} tokens a frame, not 9"))
    blocks = [range(N_SPECIAL), *(range(*bias[name]) for name in ("ssl", "codec", "text_bpe"))]
    used = [i for block in blocks for i in block]
    tail = sorted(set(range(len(about["token_list"]))) - set(used))
    rows = torch.tensor(used + tail)
    for name, i in SPECIAL.items():
        rows[i] = place.get(name, i)
    sizes = [len(block) for block in blocks]
    vocab = Vocab(sizes[1], sizes[2] // 8, 8, sizes[3], len(tail), published=True)
    return vocab, rows, bias


def published_body(folder, about, tensors):
    """The body's shape: by the base LLM's config.json, where it is at hand, or as one of the four we know."""
    tag = about.get("transformer_conf", {}).get("hf_model_tag") or ""
    for place in (folder, tag):
        if os.path.isfile(f"{place}/config.json"):
            return {name: value for name, value in read_body(place).items() if name in HF_FIELDS}
    layers = {name.split(".")[4] for name in tensors if name.startswith("corelm.decoders.model.layers.")}
    d_model = tensors["corelm.emb.weight"].shape[1] if "corelm.emb.weight" in tensors else 0
    if (len(layers), d_model) not in KNOWN_BODIES:
        raise ValueError(f"{folder}: {len(layers)} layers of width {d_model} are no base LLM that we know; "
                         f"put config.json of {tag or 'the base LLM'} beside model.pth")
    return KNOWN_BODIES[len(layers), d_model] | {"n_layer": len(layers), "d_model": d_model}


def read_published(folder):
    """A folder with model.pth, config.yaml -> (body fields, Vocab, {our name: function that reads it}, tag).

    tag: folder or hub id of the base LLM, whose text tokenizer it needs.
    """
    about, tensors = read_yaml(folder), published_tensors(read_pickle(f"{folder}/model.pth"))
    vocab, rows, bias = published_layout(folder, about)
    body = published_body(folder, about, tensors)
    config = ModelConfig(vocab.size, vocab.streams, vocab.text, published=True, **body)
    try:
        weights = published_weights(tensors, config, bias["codec"])
    except ValueError as error:
        raise ValueError(f"{folder}/model.pth: {error}") from None
    moved = not torch.equal(rows, torch.arange(len(rows)))
    read = {name: (lambda tensor=tensor, name=name: tensor[rows] if moved and name in ("emb", "lm_head")
                   else tensor) for name, tensor in weights.items()}
    return body, vocab, read, about.get("transformer_conf", {}).get("hf_model_tag")


# ---- either ------------------------------------------------------------------------------------------------

def find_start(name):
    """The folder of a base LLM or a published checkpoint, downloaded if `name` is its id on the hub."""
    return find_folder(name, LLM_FILES + OPUSLM_FILES)


def start_weights(name, config, vocab, seed, said=None, centroids=None):
    """Weights of a base LLM or of a published checkpoint -> {our name: function that reads it}."""
    folder = find_start(name)
    if not is_published(folder):
        return base_weights(folder, config, vocab, seed, said, centroids)
    body, theirs, weights, _ = read_published(folder)
    wrong = [f"{name} is {value} there, {getattr(config, name)} here" for name, value in body.items()
             if getattr(config, name) != value]
    wrong += [f"{name} is {value} there, {getattr(vocab, name)} in the data"
              for name, value in asdict(theirs).items() if getattr(vocab, name) != value]
    if wrong:
        raise ValueError(f"{folder} does not fit the configuration: {some(wrong)}")
    return weights
