"""Claim: the body is the text LLM itself, read from its files and written back; a misfit is named."""
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_here
from safetensors.torch import load_file, save_file

from attention import KVCache
from checkpoint import load_model, starting_weights
from config import Config, load_config
from convert import base_weights, export_text
from data import Dataset
from decode import generate, prepare_for_decoding
from eval import find_data
from heads import stream_logits, token_losses
from interleave import SPECIAL, TEXT, Vocab, text_frames
from parallel import empty_model
from speaker import Speaker
from tokenize_text import TextTokenizer
from train import train

BODIES = {      # model_type, query heads, key-value heads, tied
    "llama-gqa": ("llama", 4, 2, False), "llama-mha-tied": ("llama", 4, 4, True),
    "olmo2-gqa": ("olmo2", 4, 2, False), "olmo2-mha": ("olmo2", 4, 4, False)}
VOCAB = Vocab(10, 8, 8, 96)


def small_llm(kind, folder):
    """A random small LLM of transformers, saved in three shards, and the Config that fits it."""
    transformers = pytest.importorskip("transformers")
    model_type, n_head, n_kv_head, tied = BODIES[kind]
    names = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "olmo2": ("Olmo2Config", "Olmo2ForCausalLM")}
    config_class, model_class = (getattr(transformers, name) for name in names[model_type])
    torch.manual_seed(0)
    theirs = model_class(config_class(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=n_head,
        num_key_value_heads=n_kv_head, rope_theta=2e4, rms_norm_eps=1e-6, tie_word_embeddings=tied,
        initializer_range=0.1)).eval()
    for name, p in theirs.named_parameters():       # norms of 1 would hide a norm in the wrong place
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(pathlib.Path(folder).glob("*.safetensors"))) > 2
    return theirs, Config(init_from=str(folder), model_type=model_type, n_layer=3, n_head=n_head, d_ff=128,
                          n_kv_head=n_kv_head, d_model=64, rope_theta=2e4, norm_eps=1e-6)


def load(config, vocab=VOCAB):
    model = empty_model(config, vocab)
    starting_weights(config, vocab)(model)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", BODIES)
def test_logits_are_those_of_transformers_also_with_a_cache(kind, tmp_path):
    theirs, config = small_llm(kind, tmp_path)
    model, T = load(config), 600
    ids = torch.randint(96, (T,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]                              # (T, 96)
    tokens = text_frames(VOCAB, ids)
    logits = stream_logits(model, model(tokens, [T]), 0, slice(*VOCAB.text))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    cache = KVCache(model.config, 1, T)
    steps = [tokens[:500], *tokens[500:].split(1)]                          # a prompt, then one at a time
    hidden, start = [], 0
    for step in steps:
        hidden.append(model.extend(step[None], cache, torch.tensor([start]))[0])
        start += len(step)
    cached = stream_logits(model, torch.cat(hidden), 0, slice(*VOCAB.text))
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)


def test_text_rows_are_the_llms_and_new_rows_have_their_spread(tmp_path):
    theirs, config = small_llm("llama-mha-tied", tmp_path)
    model, table = load(config), theirs.get_input_embeddings().weight.detach()
    for rows, size in ((model.emb, 1.0), (model.lm_head, 0.1)):
        assert torch.equal(rows[slice(*VOCAB.text)], table) and (rows[0] == 0).all()
        new = rows[1:VOCAB.text_start]
        assert 0.95 * size < new.std() / table.std() < 1.05 * size and new.mean().abs() < 0.01
    assert not torch.equal(model.emb[:300], model.lm_head[:300]) and (model.head_emb == 0).all()
    assert torch.equal(load(config).emb, model.emb), "the same seed gives the same new rows"
    said = torch.zeros(VOCAB.n_semantic, VOCAB.n_text)
    said[3, 7] = 1
    centroids = torch.randn(VOCAB.n_semantic, 40, generator=torch.Generator().manual_seed(0))
    centroids[5] = centroids[8] + 0.1
    rows = base_weights(config.init_from, model.config, VOCAB, 0, said.numpy(), centroids)["emb"]()
    semantic = rows[slice(*VOCAB.streams[0])]
    near = torch.cosine_similarity(semantic, table[7], dim=1)
    assert near.argmax() == 3 and near[3] > 0.5, "cluster 3 starts as the text that goes with it"
    alike = torch.cosine_similarity(semantic, semantic[8], dim=1)
    assert alike[5] > 0.9 and alike.sort().values[-3] < 0.6, "and those that sound alike start alike"
    assert rows[slice(*VOCAB.streams[1])].std() < 0.11 * table.std(), "and nothing acoustic drowns it"


def broken(folder, kind):
    """Spoil one thing in a good folder."""
    config = json.load(open(f"{folder}/config.json"))
    shards = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if kind == "cut off":
        shards[1].write_bytes(shards[1].read_bytes()[:-100])
    elif kind == "shard missing":
        shards[1].unlink()
    elif kind == "no weights":
        os.remove(f"{folder}/model.safetensors.index.json")
    elif kind in ("tensor missing", "tensor unknown", "tensor of another shape"):
        tensors = load_file(shards[0])
        name = next(iter(tensors))
        tensors |= {"tensor unknown": {"model.adapter": torch.zeros(3)},
                    "tensor of another shape": {name: torch.zeros(7, 5)}}.get(kind, {})
        if kind == "tensor missing":
            del tensors[name]
        save_file(tensors, shards[0])
    else:
        config |= {"other model": {"model_type": "mamba"}, "bias": {"attention_bias": True},
                   "long rope": {"rope_parameters": {"rope_theta": 2e4, "rope_type": "yarn"}},
                   "other size": {"num_hidden_layers": 4}, "other text": {"vocab_size": 97}}[kind]
        json.dump(config, open(f"{folder}/config.json", "w"))


@pytest.mark.parametrize("kind, message", [
    ("cut off", "damaged or cut off"), ("shard missing", "lacks model-00002"),
    ("no weights", "lacks model.safe"),
    ("tensor missing", "is missing"), ("tensor unknown", "model.adapter is unknown"),
    ("tensor of another shape", r"is \(7, 5\)"),
    ("other model", "model_type is 'mamba', we have llama and olmo2"),
    ("bias", "attention_bias is True"), ("long rope", "rope_type is 'yarn'"),
    ("other size", "n_layer is 4 there, 3 here"),
    ("other text", "LLM has 97 text tokens, the prepared data have 96")])
def test_a_folder_that_does_not_fit_is_named_before_anything_is_filled(kind, message, tmp_path):
    _, config = small_llm("llama-gqa", tmp_path)
    broken(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as caught:
        starting_weights(config, VOCAB)
    assert "\n" not in str(caught.value), "one line"


def test_the_command_line_says_it_in_one_line_and_leaves_with_2(tmp_path):
    """Before any data are prepared, though the configuration's corpus is not there either."""
    small_llm("llama-gqa", tmp_path / "base")
    broken(tmp_path / "base", "shard missing")
    for flags, message in (((f"--init_from={tmp_path}/base",), "holds no text tokenizer"),
                           ((f"--init_from={tmp_path}/base", "--text_model=word"), "has its own text tokens"),
                           ((f"--init_from={tmp_path}/none",), "no such folder")):
        result = call("train.py", str(ROOT / "configs/135m.py"), *flags)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


# ---- published checkpoints ---------------------------------------------------------------------------------

NAMES = {i: name for name, i in SPECIAL.items()}


def published_folder(folder, renumbered=False, vocab=VOCAB):
    """An OpusLM checkpoint in small, as its authors save it. Returns its tensors and where their rows are."""
    theirs, config = small_llm("llama-gqa", folder)
    n_semantic, n_acoustic, n_text = vocab.n_semantic, vocab.n_acoustic, vocab.n_text
    for path in pathlib.Path(folder).glob("*.safetensors*"):
        path.unlink()                                       # config.json stays, to say what the body is
    specials = [NAMES.get(i, f"<unused_token_{i}>") for i in range(256)]
    if renumbered:                                          # as later ESPnet did with its task ids
        specials[80], specials[66] = specials[66], specials[80]
    blocks = {"special_token": specials, "ssl": [f"<ssl_code{i + 1}>" for i in range(n_semantic)],
              "codec": [f"<codec_layer{k}_code{c}>" for k in range(8) for c in range(n_acoustic)],
              "text_bpe": [f"t{i}" for i in range(n_text)], "g2p": ["<p>"] * 6}
    order = ["special_token", "codec", "ssl", "text_bpe", "g2p"] if renumbered else list(blocks)
    token_list, bias = [], {}
    for name in order:
        bias[name] = [len(token_list), len(token_list) + len(blocks[name])]
        token_list += blocks[name]
    g = torch.Generator().manual_seed(2)
    V, D = len(token_list), 64
    state = {f"corelm.decoders.{name}": p.detach().bfloat16() for name, p in theirs.named_parameters()
             if name.startswith("model.") and "embed_tokens" not in name}
    state |= {f"corelm.{name}.weight": torch.randn(rows, D, generator=g).bfloat16()
              for name, rows in (("emb", V), ("lm_head", V), ("head_emb", 12))}
    state["corelm.emb.weight"][0] = 0
    aux = torch.randn(8 * n_acoustic, D, generator=g).bfloat16()
    torch.save({"module": state | {"criterion.lm_head.weight": state["corelm.lm_head.weight"],
                                   "criterion.aux_lm_head.weight": aux}}, f"{folder}/model.pth")
    with open(f"{folder}/config.yaml", "w") as f:
        f.write(json.dumps({"token_list": token_list, "token_bias": bias, "codec_token_per_frame": 9,
                            "transformer_conf": {"hf_model_tag": "nobody/nothing"}}))     # json is yaml
    return state, aux, bias, config


@pytest.mark.parametrize("renumbered", [False, True])
def test_a_published_checkpoint_is_read_by_names(renumbered, tmp_path):
    state, aux, bias, _ = published_folder(tmp_path, renumbered)
    model, config, vocab, _ = load_model(str(tmp_path))
    assert vocab == Vocab(10, 8, 8, 96, n_tail=6, published=True)
    task = SPECIAL["<codec_ssl_asr_task>"]
    emb, head = state["corelm.emb.weight"].float(), state["corelm.lm_head.weight"].float()
    assert torch.equal(model.emb[task], emb[66 if renumbered else 80])
    assert torch.equal(model.emb[256:266], emb[slice(*bias["ssl"])])
    assert torch.equal(model.lm_head[slice(*vocab.text)], head[slice(*bias["text_bpe"])])
    assert torch.equal(model.lm_head[266:330], aux.float()), "the aux head takes the codec rows"
    assert torch.equal(model.head_emb, state["corelm.head_emb.weight"][:9].float())
    assert (config.temperature, config.top_k, config.prompt_len) == (0.8, 30, 500)


def test_a_published_checkpoint_speaks_text_trains_on_and_is_exported(tmp_path, tiny_data):
    """With the base LLM's tokenizer beside it; the corpus is tokenized with code books of the same sizes."""
    import tokenizers
    dataset = Dataset(tiny_data, "train")
    vocab = dataset.vocab
    published_folder(tmp_path / "opus", vocab=vocab)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab.n_text)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "opus/tokenizer.json"))
    os.remove(tmp_path / "opus/config.json")            # a size of its own has to be told
    unknown = call("sample.py", str(tmp_path / "opus"), "text", "w3 w4")
    assert unknown.returncode == 2 and "3 layers of width 64 are no base LLM" in unknown.stderr
    small_llm("llama-gqa", tmp_path / "base")
    shutil.copy(tmp_path / "base/config.json", tmp_path / "opus")
    said = call("sample.py", str(tmp_path / "opus"), "text", "w3 w4")
    assert said.stdout.startswith("w3 w4") and said.returncode == 0
    mute = call("sample.py", str(tmp_path / "opus"), "asr", dataset.info["audio"][0])
    assert mute.returncode == 2 and "reads and writes text only" in mute.stderr
    assert call("sample.py", "export", str(tmp_path / "opus"), str(tmp_path / "ours")).returncode == 0
    model, _, kept, _ = load_model(str(tmp_path / "ours"))
    original, _, _, _ = load_model(str(tmp_path / "opus"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values()))

    body = dict(n_layer=3, n_head=4, n_kv_head=2, d_model=64, d_ff=128, rope_theta=2e4, norm_eps=1e-6)
    config = Config(**body, init_from=str(tmp_path / "opus"), out_dir=str(tmp_path / "run"), max_steps=1,
                    lr=1e-6, muon_lr=0.0, row_frames=512, prompt_len=20, eval_every=0)
    train(config, tiny_data)
    tuned, _, vocab, _ = load_model(str(tmp_path / "run"))
    assert vocab == kept and vocab.published and vocab.n_tail == 6
    assert (tuned.lm_head - original.lm_head).abs().max() < 1e-5 and (tuned.head_emb[0] != 0).any()


def test_semantic_cluster_0_is_pad_for_published_checkpoints():
    from interleave import speech_codes, speech_frames
    vocab, codes = Vocab(10, 8, 8, 96, n_tail=6, published=True), [[0] * 9, [3] + [7] * 8]
    frames = speech_frames(vocab, codes)
    assert frames[:, 0].tolist() == [0, 259] and frames[0, 1:].tolist() == [s for s, _ in vocab.streams[1:]]
    assert speech_codes(vocab, frames).tolist() == codes


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("kind, message", [
    ("code", "which we do not run"), ("cut off", "cut off"), ("not yaml", "not readable as ESPnet's"),
    ("no token_list", "lacks token_list"), ("no eos", "no <sos/eos>"), ("tensor missing", "is missing"),
    ("no config.json", "put config.json of nobody/nothing beside")])
def test_bad_published_folders_are_explained(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, _, _, _ = published_folder(tmp_path)
    about = json.load(open("config.yaml"))
    if kind == "code":
        torch.save({"corelm.emb.weight": Evil()}, "model.pth")
    elif kind == "cut off":
        pathlib.Path("model.pth").write_bytes(pathlib.Path("model.pth").read_bytes()[:5000])
    elif kind == "not yaml":
        pathlib.Path("config.yaml").write_text("a: [")
    elif kind == "tensor missing":
        del state["corelm.decoders.model.layers.1.mlp.up_proj.weight"]
        torch.save(state, "model.pth")
    elif kind == "no config.json":
        os.remove("config.json")
    else:
        if kind == "no eos":
            about["token_list"][5] = "<other>"
        else:
            del about["token_list"]
        pathlib.Path("config.yaml").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(".")
    assert "\n" not in str(caught.value) and not os.path.exists("evil")


# ---- sharded loading ---------------------------------------------------------------------------------------

SHARDED = """
import json, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from config import Config
from interleave import Vocab
from checkpoint import starting_weights
from parallel import meta_model
dist.init_process_group("gloo")
config, vocab = Config(**json.load(open(sys.argv[1]))), Vocab(10, 8, 8, 96)
model = meta_model(config, vocab)
for block in model.blocks:
    fully_shard(block)
fully_shard(model)
model.to_empty(device="cpu")
starting_weights(config, vocab)(model)
whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
local = sum(tensor.to_local().numel() for tensor in model.state_dict().values())
if dist.get_rank() == 0:
    torch.save([whole, local], sys.argv[2])
dist.barrier()
"""


def test_two_ranks_each_load_half_of_the_same_model(tmp_path):
    _, config = small_llm("olmo2-gqa", tmp_path)
    (tmp_path / "sharded.py").write_text(SHARDED)
    (tmp_path / "our.json").write_text(json.dumps(dataclasses.asdict(config)))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                    tmp_path / "sharded.py", tmp_path / "our.json", tmp_path / "whole.pt"], check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    whole, local = torch.load(tmp_path / "whole.pt")
    alone = load(config).state_dict()
    assert all(torch.equal(alone[name], whole[name]) for name in alone)
    assert local < 0.52 * sum(tensor.numel() for tensor in alone.values())


# ---- out again, and real weights ---------------------------------------------------------------------------

def call(script, *arguments):
    return subprocess.CompletedProcess(arguments, *run_here(ROOT / script, *arguments))


def test_an_exported_run_is_read_back_bit_for_bit(tiny_run, tiny_data, tmp_path):
    folder = str(tmp_path / "exported")
    result = call("sample.py", "export", tiny_run, folder)
    assert result.returncode == 0, result.stderr
    names = {"model.safetensors", "config.json", "state.json", "audio_tokenizer", "text_tokenizer"}
    assert set(os.listdir(folder)) == names
    (model, config, vocab, _), (again, config2, vocab2, state) = load_model(tiny_run), load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert (config, vocab) == (config2, vocab2) and "data" not in state
    assert find_data(Speaker(folder)) == tiny_data, "where the configuration has them"
    taken = call("sample.py", "export", tiny_run, folder)
    assert taken.returncode == 2 and "is there already" in taken.stderr


@pytest.mark.parametrize("kind", ["llama-mha-tied", "olmo2-gqa"])
def test_a_trained_model_goes_out_as_a_plain_text_llm(kind, tmp_path):
    """After a step of training on speech, transformers gives the same text logits as our model."""
    transformers = pytest.importorskip("transformers")
    _, config = small_llm(kind, tmp_path / "base")
    model = load(config).requires_grad_(True)
    tokens = torch.cat([torch.randint(s, e, (30, 1)) for s, e in VOCAB.streams], 1)
    weight = VOCAB.weights()[tokens[1:]]
    losses = token_losses(model, model(tokens[:-1], [29]), tokens[1:], weight, torch.ones(29), "grammar")
    (losses * weight).sum().backward()
    torch.optim.AdamW(model.parameters(), 1e-2).step()
    assert (model.head_emb[0] == 0).all() and (model.head_emb[1:] != 0).any(), "the text path stays an LLM"
    os.makedirs(tmp_path / "text")
    assert export_text(model, str(tmp_path / "text")) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    ids = torch.randint(96, (40,))
    ours = stream_logits(model, model(text_frames(VOCAB, ids), [40]), 0, slice(*VOCAB.text))
    torch.testing.assert_close(theirs(ids[None]).logits[0], ours, rtol=0, atol=1e-5)


PROSE = """\
The harbour lay quiet in the early light, and the boats had not yet gone out. An old man sat on the wall
with a net across his knees, mending it slowly, as he had done every morning since the war. He did not
look up when the children came past on their way to school, though he knew each of them by the sound of
their shoes. "Rain by noon," he said to nobody, and nobody answered. Across the bay the lighthouse
blinked once more, as if it had only just remembered, and then it was day. The baker opened his
shutters; the smell of bread went down the hill and met the smell of salt and tar coming up. By eight
o'clock the first clouds stood over the hills, small and grey."""


def test_the_real_smollm2_is_itself_inside_the_nine_stream_model(smollm2):
    """Logits, perplexity of a page, and 64 greedy tokens are those of transformers, before any training."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = TextTokenizer.load(smollm2)
    config = load_config([str(ROOT / "configs/135m.py"), f"--init_from={smollm2}"])
    vocab = Vocab(5000, 1024, 8, tokenizer.n_text)
    model, text = load(config, vocab), slice(*vocab.text)
    ids = torch.tensor(tokenizer.encode(PROSE))
    logits = stream_logits(model, model(text_frames(vocab, ids), [len(ids)]), 0, text)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    ours, hf = (torch.nn.functional.cross_entropy(x[:-1], ids[1:]).exp() for x in (logits, expected))
    assert f"{ours:.4g}" == f"{hf:.4g}" and 5 < ours < 60
    prompt = ids[:30]
    eos = theirs.generation_config.eos_token_id
    with torch.no_grad():
        generated = theirs.generate(prompt[None], max_new_tokens=64, min_new_tokens=64, do_sample=False)
    generated = generated[0, 30:]
    prepare_for_decoding(model)
    [(frames, _)] = generate(model, vocab, [text_frames(vocab, prompt)], TEXT, 64, 64)
    assert (frames[:, 0] - vocab.text_start).tolist() == generated.tolist() and eos not in generated
