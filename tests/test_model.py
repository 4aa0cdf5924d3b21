"""Claim: each logit sees exactly what it may, packing and caching change nothing, the loss is ESPnet's."""
import json

import pytest
import torch
from conftest import shared_folder

import heads
from attention import KVCache, attend_dense, attend_documents
from config import Config
from heads import token_losses, weighted_loss
from interleave import delay, training_example
from model import Model, ModelConfig, SwiGLU, from_published, to_published
from parallel import prepare_for_speed


@pytest.fixture(scope="module")
def model(toy):
    config = ModelConfig(toy.size, toy.streams, toy.text, n_layer=2,
                          n_head=4, n_kv_head=2, d_model=32, d_ff=64)
    model = Model(config).init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.head_emb, generator=torch.Generator().manual_seed(1))
    return model


def documents(toy, toy_example):
    return [training_example(toy, task, toy_example(5 + i, 3, seed=i), toy.weights())
            for i, task in enumerate(("asr", "tts", "speech", "text"))]


def test_changing_a_token_moves_the_logits_after_it_and_no_others(toy, toy_example, model):
    tokens = documents(toy, toy_example)[1][0]                              # (T, N), delayed
    before = model(tokens, [len(tokens)])
    t, n = 30, 2
    assert tokens[t, n] != 0
    changed = tokens.clone()
    changed[t, n] = toy.streams[n][0] + (tokens[t, n] - toy.streams[n][0] + 1) % toy.n_acoustic
    moved = (model(changed, [len(tokens)]) - before).abs().amax(1) > 1e-6   # (T,)
    assert not moved[:t].any() and moved[t:].all()


def test_packed_documents_are_the_same_documents_alone(toy, toy_example, model):
    parts = [inputs for inputs, *_ in documents(toy, toy_example)]
    packed = model(torch.cat(parts), [len(part) for part in parts])
    alone = torch.cat([model(part, [len(part)]) for part in parts])
    torch.testing.assert_close(packed, alone)


def test_attention_by_document_is_sdpa_with_a_block_diagonal_mask():
    """The long one has more than one block of queries."""
    g, lengths = torch.Generator().manual_seed(0), [5, 1, 300]
    q, k, v = (torch.randn(306, n_head, 8, generator=g, requires_grad=True) for n_head in (4, 2, 2))
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(306, 306, dtype=torch.bool).tril()
    dense = attend_dense(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask[None, None])[0].transpose(0, 1)
    packed = attend_documents(q, k, v, lengths)
    torch.testing.assert_close(packed, dense)
    weight = torch.randn(306, 4, 8, generator=g)
    gradients = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (packed, dense))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_cached_steps_are_the_full_forward_also_for_ragged_prompts(toy, toy_example, model):
    long, short = (training_example(toy, "asr", toy_example(n, 3), toy.weights())[0] for n in (9, 4))
    full = [model(tokens, [len(tokens)]) for tokens in (long, short)]
    start = torch.tensor([10, 6])                                           # frames of each prompt
    batch = torch.stack([long[:10], torch.cat([short[:6], long[:4]])])      # the short one, filled up
    cache = KVCache(model.config, 2, len(long))
    hidden = model.extend(batch, cache, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(hidden[0], full[0][:10])
    torch.testing.assert_close(hidden[1, :6], full[1][:6])
    for step in range(5):
        rows = torch.stack([long[10 + step], short[6 + step]])[:, None]
        hidden = model.extend(rows, cache, start + step)
        torch.testing.assert_close(hidden[0, 0], full[0][10 + step])
        torch.testing.assert_close(hidden[1, 0], full[1][6 + step])
    with pytest.raises(ValueError, match="cache holds"):
        model.extend(rows, cache, start + 50)


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype, of_loss, of_gradient", [
    (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-3, 3e-2)])
def test_the_whole_fast_path_is_the_plain_path(dtype, of_loss, of_gradient, toy, toy_example):
    """Packed documents, attention by blocks, recomputed activations and the fused loss, against each document
    alone, dense attention and the plain loss, in the same number format."""
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=64, d_ff=96)
    model = Model(ModelConfig(toy.size, toy.streams, toy.text, **sizes), dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    examples, results = documents(toy, toy_example), []

    def dense(q, k, v, lengths):
        T = len(q)
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
        return attend_dense(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask)[0].transpose(0, 1)

    for fast in (False, True):
        model.checkpointing, model.attend = fast, attend_documents if fast else dense
        rows = [tuple(torch.cat(part) for part in zip(*examples))] if fast else examples
        total = 0
        for inputs, targets, weight, modality in rows:
            hidden = model(inputs, [len(example[0]) for example in examples] if fast else [len(inputs)])
            loss_of = weighted_loss if fast else token_losses
            loss = loss_of(model, hidden, targets, weight, modality, "original")
            total = total + (loss[0] if fast else (loss * weight).sum())
        results.append([total, *torch.autograd.grad(total, list(model.parameters()))])
    (plain, *plain_gradients), (fast, *fast_gradients) = results
    assert relative(fast, plain) < of_loss
    for a, b in zip(fast_gradients, plain_gradients):
        assert relative(a, b) < of_gradient


@pytest.mark.slow       # half a minute of compiling
def test_compiled_blocks_are_the_blocks(toy, toy_example):
    """With the switch of the configuration; where there is no compiler it says so and goes on."""
    tokens = documents(toy, toy_example)[0][0]
    said, outputs = [], []
    for flag in ("false", "true"):
        model = Model(ModelConfig(toy.size, toy.streams, toy.text, n_layer=1, n_head=2, d_model=32, d_ff=32))
        model.init_weights(torch.Generator().manual_seed(0))
        config = Config(compile=flag == "true")
        prepare_for_speed(model, config, torch.device("cpu"), said.append)
        outputs.append(model(tokens, [len(tokens)]))
    assert said[0] == "attention: attend_documents"
    assert "compiled" in said[1] or "no C++ compiler" in said[1]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("scope", ["grammar", "original"])
def test_the_fused_loss_is_the_plain_one_with_its_gradients(scope, published, toy, toy_example, monkeypatch):
    """In chunks of 16 rows, the last one filled up, with and without stream 0's head embedding."""
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "ROWS", 16)
    config = ModelConfig(toy.size, toy.streams, toy.text, n_layer=1, n_head=2, d_model=32, d_ff=32,
                         published=published)
    model = Model(config).init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.head_emb, generator=torch.Generator().manual_seed(1))
    inputs, targets, weight, modality = (torch.cat(part) for part in zip(*documents(toy, toy_example)))
    weight[5:9] = 0                                                         # rows that are not learned
    results = []
    for loss_of in (token_losses, weighted_loss):
        hidden = model(inputs, [len(inputs)])
        loss = loss_of(model, hidden, targets, weight, modality, scope)
        total, losses = ((loss * weight).sum(), loss) if loss_of is token_losses else loss
        gradients = torch.autograd.grad(3 * total, list(model.parameters()))
        results.append([total, losses, *gradients])
    for plain, fused in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(weighted_loss(model, hidden, targets, weight, modality, scope)[0], total)


def test_pad_adds_nothing_and_learns_nothing(toy, toy_example, model):
    inputs, targets, weight, modality = documents(toy, toy_example)[0]
    loss, _ = weighted_loss(model, model(inputs, [len(inputs)]), targets, weight, modality, "grammar")
    gradient, = torch.autograd.grad(loss, model.emb)
    assert (gradient[0] == 0).all() and (model.emb[0] == 0).all() and gradient.abs().sum() > 0


def golden():
    folder = shared_folder()
    if not folder:
        pytest.skip("no golden vectors here")
    from safetensors.torch import load_file
    tensors = load_file(folder / "golden/espnet_llama.safetensors")
    return tensors, json.load(open(folder / "golden/espnet_llama.json"))


@pytest.mark.parametrize("layout", ["flat", "with an aux head, wrapped"])
def test_losses_and_gradients_are_those_of_espnets_own_code(layout):
    """Golden vectors: a two-layer Llama with ESPnet's delay, loss and gradients.

    The older layout keeps the codec rows in a matrix of their own; those of lm_head are then anything.
    """
    tensors, about = golden()
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("corelm.")}
    if layout != "flat":
        rows = slice(*about["token_bias"]["codec"])
        aux = state["corelm.lm_head.weight"][rows].clone()
        state["corelm.lm_head.weight"] = state["corelm.lm_head.weight"].clone()
        state["corelm.lm_head.weight"][rows] = 0
        state |= {"corelm.aux_lm_head.weight": aux, "criterion.aux_lm_head.weight": aux,
                  "criterion.lm_head.weight": state["corelm.lm_head.weight"]}
        state = {"module": state}
    model = from_published(state, about["body"], about["token_bias"])
    tokens, mask = tensors["tokens"].long(), tensors["mask"]
    assert torch.equal(delay(tokens), tensors["delayed"].long())
    ours = model.published_loss(tokens, mask, about["modality_weights"])
    assert torch.equal(ours["element_loss"] > 0, tensors["loss_mask"] > 0)
    torch.testing.assert_close(ours["element_loss"], tensors["element_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours["loss"], tensors["loss"][0], rtol=1e-5, atol=0)
    delayed = delay(tokens)[:, :-1]
    hidden = model(delayed.flatten(0, 1), [delayed.shape[1]] * len(delayed))[:, None] + model.head_emb
    torch.testing.assert_close(hidden, tensors["hidden"].flatten(0, 1), rtol=1e-4, atol=1e-4)
    ours["loss"].backward()
    for name, grad in to_published({name: p.grad for name, p in model.named_parameters()}).items():
        expected = tensors["grad." + name][:len(grad)]
        assert (grad - expected).norm() < 1e-3 * expected.norm(), name


def test_published_layouts_that_do_not_fit_are_explained():
    tensors, about = golden()
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("corelm.")}
    head = state["corelm.lm_head.weight"]
    for change, message in (({"corelm.lm_head.weight": head[:5]}, r"corelm.lm_head.weight is \(5, 64\)"),
                            ({"corelm.lm_head.weight": None}, "corelm.lm_head.weight is missing"),
                            ({"corelm.adapter.weight": head[:7]}, "corelm.adapter.weight is unknown")):
        broken = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            from_published(broken, about["body"], about["token_bias"])


def test_swiglu_that_keeps_only_its_inputs_has_the_derivative_of_the_plain_one():
    g = torch.Generator().manual_seed(0)
    gate, up, weight = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    gradients = []
    for form in (SwiGLU.apply, lambda gate, up: torch.nn.functional.silu(gate) * up):
        inputs = [x.clone().requires_grad_() for x in (gate, up)]
        (form(*inputs) * weight).sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(*gradients)
