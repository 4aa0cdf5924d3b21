"""The model: one decoder-only Transformer that reads sums of N embeddings and predicts N tokens a step.

Fourth file of the reading order; it takes numbers, never a Vocab. The body is a text LLM, exactly: SmolLM2
(Llama: RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no biases) or OLMo-2
(the same with its RMSNorms after each sub-layer, and on q and k). Around it stands what makes it OpusLM
(arXiv 2506.17611, section 2): the summed embedding, and the parallel heads of heads.py.

       delayed tokens (B, T, N)                                     scores of N streams (heads.py)
                 |                                                                ^
          sum of N embeddings (emb)  -->  blocks  -->  norm  -->  hidden (B, T, D), lm_head, head_emb

The last part reads and writes the layout of the published OpusLM checkpoints.

Dimension letters: see interleave.py.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attend_documents, rope_table, rotate
from heads import weighted_loss
from interleave import PAD, delay


@dataclass
class ModelConfig:
    vocab_size: int         # V, all modalities
    streams: list           # [(start, end)] id range of each stream of a speech frame; its length is N
    text: tuple             # (start, end) id range of text
    n_special: int = 256    # ids [0, n_special) are special tokens; 0 is pad
    published: bool = False     # as in the published checkpoints: see embed and heads.stream_logits
    model_type: str = "llama"   # or olmo2: the names of Hugging Face
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 2      # each key-value head serves n_head / n_kv_head query heads
    d_model: int = 192
    d_ff: int = 512
    rope_theta: float = 1e4
    norm_eps: float = 1e-5

    @property
    def n_stream(self):
        return len(self.streams)


# ---- body --------------------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A matrix without bias, kept in fp32 and cast to the dtype of its input: the whole of our dtype policy.

    Master weights and gradients stay fp32; bf16 activations (see Model.dtype) give bf16 matrix products.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, which keeps only its inputs for the backward pass: a twelfth of a layer's memory."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, upstream):
        gate, up = ctx.saved_tensors
        s = gate.sigmoid()
        silu = gate * s
        return (s + silu * (1 - s)).mul_(up).mul_(upstream), silu.mul_(upstream)


class Block(nn.Module):
    """One Transformer layer.

        Llama    x + attention(norm(x))    then    x + mlp(norm(x))
        OLMo-2   x + norm(attention(x))    then    x + norm(mlp(x)),   with norms over the whole q and k
    """

    def __init__(self, config):
        super().__init__()
        D, H, G = config.d_model, config.n_head, config.n_kv_head
        self.n_head, self.n_kv_head, self.head_dim = H, G, D // H

        def norm(model_type, width):
            here = config.model_type == model_type
            return RMSNorm(width, config.norm_eps) if here else nn.Identity()

        self.attn_norm, self.mlp_norm = norm("llama", D), norm("llama", D)
        self.attn_out_norm, self.mlp_out_norm = norm("olmo2", D), norm("olmo2", D)
        self.q_norm, self.k_norm = norm("olmo2", D), norm("olmo2", G * self.head_dim)
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, G * self.head_dim)
        self.v_proj = Linear(D, G * self.head_dim)
        self.o_proj = Linear(D, D)
        self.gate_proj = Linear(D, config.d_ff)
        self.up_proj = Linear(D, config.d_ff)
        self.down_proj = Linear(config.d_ff, D)

    def qkv(self, x, cos, sin):
        """x (..., D) -> rotated q (..., H, E), rotated k (..., G, E), v (..., G, E)."""
        x = self.attn_norm(x)
        q = self.q_norm(self.q_proj(x)).unflatten(-1, (self.n_head, self.head_dim))         # (..., H, E)
        k = self.k_norm(self.k_proj(x)).unflatten(-1, (self.n_kv_head, self.head_dim))      # (..., G, E)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_head, self.head_dim))                   # (..., G, E)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, attend):
        """x (..., D) -> (..., D); attend(q, k, v) -> (..., H, E): who looks at whom."""
        q, k, v = self.qkv(x, cos, sin)
        return self.finish(x, attend(q, k, v))

    def finish(self, x, mixed):
        """Residual stream x (..., D) and attention output (..., H, E) -> the layer's output (..., D)."""
        x = x + self.attn_out_norm(self.o_proj(mixed.flatten(-2)))
        h = self.mlp_norm(x)
        return x + self.mlp_out_norm(self.down_proj(SwiGLU.apply(self.gate_proj(h), self.up_proj(h))))


# ---- the whole model ---------------------------------------------------------------------------------------

def initial_weight(config, name, shape, generator=None, device=None):
    """Of a parameter: matrices N(0, 1/D) as in SmolLM2-135M, those into the residual stream smaller by
    sqrt(2 layers), norms 1."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    if name == "head_emb":          # NOTE(espnet): N(0, 1) there; zero keeps a base LLM's text path as it is
        return torch.zeros(shape, device=device)
    std = config.d_model ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.n_layer)
    weight = torch.empty(shape, device=device).normal_(0, std, generator=generator)
    if name == "emb":
        weight[PAD] = 0             # adds nothing to a frame's sum
    return weight


class Model(nn.Module):
    """emb (V, D) is shared by all streams at the input; lm_head (V, D) and head_emb (N, D) at the output."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype         # of the activations; parameters are fp32 in training
        self.attend, self.checkpointing = attend_documents, False           # see parallel.prepare_for_speed
        D = config.d_model
        self.emb = nn.Parameter(torch.empty(config.vocab_size, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(D, config.norm_eps)
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, D))
        self.head_emb = nn.Parameter(torch.empty(config.n_stream, D))

    @torch.no_grad()
    def init_weights(self, generator=None):
        for name, p in self.named_parameters():
            p.copy_(initial_weight(self.config, name, p.shape, generator, p.device))
        return self

    def embed(self, tokens):
        """tokens (..., N) -> (..., D): sum of the streams' embeddings; pad counts 0 and gets no gradient."""
        flat = F.embedding_bag(tokens.reshape(-1, tokens.shape[-1]), self.emb, mode="sum", padding_idx=PAD)
        x = flat.view(*tokens.shape[:-1], -1)                               # (..., D)
        if self.config.published:       # should be 0 there too, but that is the checkpoint's word
            x = x + (tokens == PAD).sum(-1, keepdim=True) * self.emb[PAD].detach()
        return x.to(self.dtype)

    def forward(self, tokens, lengths):
        """Packed documents, delayed: tokens (S, N), lengths of the documents (sum S) -> hidden (S, D)."""
        x = self.embed(tokens)                                              # (S, D)
        position = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        table = rope_table(self.config, max(lengths), tokens.device)
        cos, sin = (t.to(x.dtype)[position, None] for t in table)
        attend = lambda q, k, v: self.attend(q, k, v, lengths)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.norm(x)

    @torch.no_grad()
    def extend(self, tokens, cache, start):
        """The same with a cache: tokens (B, T, N) are frames start (B,).. of each row -> hidden (B, T, D).

            cache slot    0 1 2 3 4 5 6        a step of T=1 at position 4 writes slot 4
            may look at   x x x x x . .        and looks at slots 0..4
        """
        B, T, _ = tokens.shape
        x = self.embed(tokens)                                              # (B, T, D)
        position = start[:, None] + torch.arange(T, device=tokens.device)   # (B, T)
        end = int(position.max()) + 1
        if end > cache.k.shape[3]:
            raise ValueError(f"sequence of {end} frames, but the cache holds {cache.k.shape[3]}")
        cos, sin = (table[position, None] for table in cache.rope)          # (B, T, 1, E)
        mask = (torch.arange(end, device=tokens.device) <= position[..., None])[:, None]    # (B, 1, T, end)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, lambda q, k, v: cache.attend(i, q, k, v, position, mask))  # noqa: B023
        return self.norm(x)

    def published_loss(self, tokens, mask, modality_weights):
        """The loss as ESPnet computes it, of aligned tokens (B, T, N) that end in pads; mask (B, T, N) 0/1.

        modality_weights: {modality of token_bias: loss weight of its ids as targets}. Returns {"loss":
        scalar, per frame with a stream-0 target; "element_loss" (B, T-1, N): nats times weight, 0 where
        masked}.
        """
        B, T, N = tokens.shape
        weights = torch.zeros(self.config.vocab_size, device=tokens.device)
        for modality, (start, end) in self.token_bias.items():
            weights[start:end] = modality_weights[modality]
        delayed = delay(tokens)                                             # (B, T, N)
        learn = delay(mask.long() * (tokens != PAD))[:, 1:]                 # (B, T-1, N)
        hidden = self(delayed[:, :-1].flatten(0, 1), [T - 1] * B)           # (B * (T-1), D)
        targets, weight = delayed[:, 1:], weights[delayed[:, 1:]] * learn   # (B, T-1, N)
        flat = (targets.flatten(0, 1), weight.flatten(0, 1))
        loss, losses = weighted_loss(self, hidden, *flat, None, "original")     # (), (B * (T-1), N)
        return {"loss": loss / learn[..., 0].sum(), "element_loss": losses.view(B, T - 1, N) * weight}


# ---- names of Hugging Face and of the published checkpoints ------------------------------------------------

NORM_NAMES = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",               # Llama
              "attn_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm",
              "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}                           # OLMo-2


def body_name(name):
    """Our name of a body parameter -> Hugging Face's: blocks.0.q_proj.* -> layers.0.self_attn.q_proj.*"""
    if not name.startswith("blocks."):
        return name                                                         # norm.weight
    _, i, part, kind = name.split(".")
    place = "mlp." if part in ("gate_proj", "up_proj", "down_proj") else "self_attn."
    return f"layers.{i}.{NORM_NAMES.get(part) or place + part}.{kind}"


def to_published(tensors):
    """{our parameter name: tensor} -> {ESPnet's name: tensor}: weights, or gradients."""
    return {f"corelm.{name}.weight" if name in ("emb", "lm_head", "head_emb") else
            f"corelm.decoders.model.{body_name(name)}": tensor for name, tensor in tensors.items()}


Model.to_published = staticmethod(to_published)


def some(problems, limit=6):
    """A list of complaints as one line."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more


def misfits(found, expected):
    """Complaints about tensors: {name: shape} that are there, against those there should be."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is {tuple(found[name])}, {tuple(shape)} expected" for name, shape in expected.items()
              if name in found and tuple(found[name]) != tuple(shape)]
    return wrong + [f"{name} is unknown" for name in found if name not in expected]


def published_tensors(state):
    """A loaded checkpoint, flat or under "model" or "module" -> {"corelm.*" or "criterion.*": tensor}."""
    for wrapper in ("model", "module"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return {re.sub(r"^.*?(?=(corelm|criterion)\.)", "", name): tensor for name, tensor in state.items()}


def published_weights(tensors, config, codec):
    """`published_tensors` as {our name: tensor}; an error names the misfits.

    Older checkpoints score the codec streams with a matrix of their own: it takes the place of the codec rows
    (start, end) of lm_head, which no codec loss has ever used there. Rows of head_emb beyond stream N are
    cut.
    """
    with torch.device("meta"):
        ours = Model(config).state_dict()
    theirs = to_published({name: name for name in ours})                    # {their name: our name}
    tensors = dict(tensors)
    tensors.pop("criterion.lm_head.weight", None)                           # the same tensor once more
    aux_shape = (codec[1] - codec[0], config.d_model)
    aux = {name: tensors.pop(name) for name, tensor in list(tensors.items())
           if name not in theirs and tensor.shape == aux_shape}
    if "corelm.head_emb.weight" in tensors:
        tensors["corelm.head_emb.weight"] = tensors["corelm.head_emb.weight"][:config.n_stream]
    wrong = misfits({name: tensor.shape for name, tensor in tensors.items()},
                    {name: ours[our].shape for name, our in theirs.items()})
    first = next(iter(aux), None)
    wrong += [f"{name} is not {first}" for name in aux if not torch.equal(aux[name], aux[first])]
    if wrong:
        raise ValueError(some(wrong))
    weights = {our: tensors[name] for name, our in theirs.items()}
    if aux:
        weights["lm_head"] = weights["lm_head"].clone()
        weights["lm_head"][codec[0]:codec[1]] = aux[first]
    return weights


def from_published(state, body, token_bias):
    """The Model of a checkpoint in ESPnet's layout, ids as they are there.

    state: {"corelm.*": tensor}, flat or under "model" or "module".  body: n_layer, d_model, d_ff, n_head,
    n_kv_head, rope_theta, rms_norm_eps, model_type.  token_bias: {modality: (start, end)} with ssl, codec and
    text_bpe. ValueError names what does not fit. (Folders with model.pth: convert.py.)
    """
    tensors = published_tensors(state)
    shape = {name: body[name] for name in ("n_layer", "n_head", "n_kv_head", "d_model", "d_ff", "rope_theta",
                                           "model_type")}
    start, end = token_bias["codec"]
    edges = range(start, end + 1, (end - start) // 8)                       # of the 8 acoustic levels
    n_row = len(tensors.get("corelm.emb.weight", ()))
    config = ModelConfig(n_row, [tuple(token_bias["ssl"]), *zip(edges, edges[1:])],
                         tuple(token_bias["text_bpe"]), published=True, norm_eps=body["rms_norm_eps"],
                         **shape)
    weights = published_weights(tensors, config, (start, end))
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    model.token_bias = dict(token_bias)
    return model.requires_grad_(True)
