"""The model: one decoder-only Transformer that reads sums of N embeddings and predicts N tokens a step.

Second file of the reading order; it imports nothing of ours and takes numbers, never a Vocab. The body is
SmolLM2's (Llama): RMSNorm before each sub-layer, rotary positions, grouped-query attention, SwiGLU, no
biases. Around it stand what makes it OpusLM (arXiv 2506.17611, section 2): the summed embedding and the
parallel heads with their loss.

       delayed tokens (B, T, N)                      logits of stream n = W[range of n] (hidden + head_emb[n])
                 |                                                ^
          sum of N embeddings  -->  blocks  -->  norm  -->  hidden (B, T, D)

Dimension letters: see interleave.py.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelConfig:
    vocab_size: int         # V, all modalities
    streams: list           # [(start, end)] id range of each stream of a speech frame; its length is N
    n_special: int = 256    # ids [0, n_special) are special tokens; 0 is pad
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

    @property
    def text_start(self):   # text ids fill the end of the vocabulary
        return self.streams[-1][1]


# ---- body --------------------------------------------------------------------------------------------------

def rope_table(config, n_position, device=None):
    """(cos, sin), each (n_position, E): the rotation angles of every position, fp32."""
    E = config.d_model // config.n_head
    frequency = config.rope_theta ** (-torch.arange(0, E, 2, device=device).float() / E)    # (E/2,)
    position = torch.arange(n_position, device=device).float()
    angle = torch.outer(position, frequency).repeat(1, 2)                                   # (n_position, E)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding, rotate-half form: x (..., heads, E), cos and sin (..., 1, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend_dense(q, k, v, mask):
    """Reference attention: q (B, H, T, E), k and v (B, G, U, E), mask (B, 1, T, U) bool, True = may look.

    Query head h reads key-value head h // (H/G). Returns (B, H, T, E).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_documents(q, k, v, lengths):
    """Causal attention inside each document of packed frames: q (S, H, E), k and v (S, G, E) -> (S, H, E).

    lengths: frames of each document, in order, summing to S. The H/G query heads that share a key-value head
    are stacked into rows of one matrix product, and no product reaches over a document's border: on a CPU
    that spares the products across documents; its tested reference is SDPA with a document mask.
    """
    S, H, E = q.shape
    G = k.shape[1]
    q = (q * E ** -0.5).view(S, G, H // G, E).permute(1, 2, 0, 3)           # (G, H/G, S, E)
    k, v = k.permute(1, 2, 0), v.transpose(0, 1)                            # (G, E, S), (G, S, E)
    outputs, causal = [], _causal_bias(max(lengths), q)
    for q_doc, k_doc, v_doc in zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 1)):
        T = q_doc.shape[2]
        scores = (q_doc.reshape(G, -1, E) @ k_doc).view(G, H // G, T, T) + causal[:T, :T]
        mixed = scores.softmax(-1).view(G, -1, T) @ v_doc                   # (G, H/G * T, E)
        outputs.append(mixed.view(H, T, E))
    return torch.cat(outputs, 1).transpose(0, 1)                            # (S, H, E)


def _causal_bias(T, like):
    return torch.full((T, T), -math.inf, device=like.device, dtype=like.dtype).triu(1)   # (T, T): 0 may look


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


class Block(nn.Module):
    """One Transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        D, H, G = config.d_model, config.n_head, config.n_kv_head
        self.n_head, self.n_kv_head, self.head_dim = H, G, D // H
        self.attn_norm = RMSNorm(D, config.norm_eps)
        self.q_proj = Linear(D, D)
        self.k_proj = Linear(D, G * self.head_dim)
        self.v_proj = Linear(D, G * self.head_dim)
        self.o_proj = Linear(D, D)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.gate_proj = Linear(D, config.d_ff)
        self.up_proj = Linear(D, config.d_ff)
        self.down_proj = Linear(config.d_ff, D)

    def qkv(self, x, cos, sin):
        """x (..., D) -> rotated q (..., H, E), rotated k (..., G, E), v (..., G, E)."""
        x = self.attn_norm(x)
        q = self.q_proj(x).unflatten(-1, (self.n_head, self.head_dim))      # (..., H, E)
        k = self.k_proj(x).unflatten(-1, (self.n_kv_head, self.head_dim))   # (..., G, E)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_head, self.head_dim))   # (..., G, E)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x, mixed):
        """Residual stream x (..., D) and attention output (..., H, E) -> the layer's output (..., D)."""
        x = x + self.o_proj(mixed.flatten(-2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


# ---- key-value cache ---------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of each layer for B sequences of up to T_max frames; slot t of a row holds its frame t.

    Rows of a batch may stand at different frames: a frame beyond a row's own end is overwritten when the row
    gets there, and no query looks past its own position, so ragged prompts need no padding on the left.
    """

    def __init__(self, config, B, T_max, device=None, dtype=torch.float32):
        shape = (config.n_layer, B, config.n_kv_head, T_max, config.d_model // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)             # (layers, B, G, T_max, E)
        self.v = torch.zeros(shape, device=device, dtype=dtype)


# ---- the whole model ---------------------------------------------------------------------------------------

class Model(nn.Module):
    """emb (V, D) is shared by all streams at the input; lm_head (V, D) and head_emb (N, D) at the output."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype         # dtype of the activations; parameters are always fp32
        D = config.d_model
        self.emb = nn.Parameter(torch.empty(config.vocab_size, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(D, config.norm_eps)
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, D))
        self.head_emb = nn.Parameter(torch.empty(config.n_stream, D))

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Matrices N(0, 1/D) as in SmolLM2-135M, those into the residual stream smaller by sqrt(2 layers)."""
        std = self.config.d_model ** -0.5
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)                                                # norms
            else:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, std / math.sqrt(2 * self.config.n_layer) if last else std, generator=generator)
        self.head_emb.zero_()       # NOTE(espnet): N(0, 1) there; zero keeps a base LLM's text path as it is
        self.emb[0] = 0             # pad adds nothing to a frame's sum
        return self

    def embed(self, tokens):
        """tokens (..., N) -> (..., D): sum of the streams' embeddings; pad counts 0 and gets no gradient."""
        flat = F.embedding_bag(tokens.reshape(-1, tokens.shape[-1]), self.emb, mode="sum", padding_idx=0)
        return flat.view(*tokens.shape[:-1], -1).to(self.dtype)             # (..., D)

    def forward(self, tokens, lengths):
        """Packed documents, delayed: tokens (S, N), lengths of the documents (sum S) -> hidden (S, D)."""
        x = self.embed(tokens)                                              # (S, D)
        position = torch.cat([torch.arange(n, device=tokens.device) for n in lengths])
        table = rope_table(self.config, max(lengths), tokens.device)
        cos, sin = (t.to(x.dtype)[position, None] for t in table)
        for block in self.blocks:
            q, k, v = block.qkv(x, cos, sin)
            x = block.finish(x, attend_documents(q, k, v, lengths))
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
        table = rope_table(self.config, end, tokens.device)
        cos, sin = (t.to(x.dtype)[position, None] for t in table)           # (B, T, 1, E)
        mask = (torch.arange(end, device=tokens.device) <= position[..., None])[:, None]    # (B, 1, T, end)
        rows = torch.arange(B, device=tokens.device)[:, None]
        for block, k_cache, v_cache in zip(self.blocks, cache.k, cache.v):
            q, k, v = block.qkv(x, cos, sin)                                # (B, T, heads, E)
            k_cache[rows, :, position], v_cache[rows, :, position] = k, v
            mixed = attend_dense(q.transpose(1, 2), k_cache[:, :, :end], v_cache[:, :, :end], mask)
            x = block.finish(x, mixed.transpose(1, 2))
        return self.norm(x)

    def logits(self, hidden, stream, rows):
        """Scores of ids as a stream's next token: hidden (..., D), rows: slice or ids -> (..., len) fp32."""
        hidden = hidden + self.head_emb[stream].to(hidden.dtype)
        return F.linear(hidden, self.lm_head[rows].to(hidden.dtype)).float()

    def token_losses(self, hidden, targets, weight, modality, scope):
        """Cross-entropies in nats: hidden (S, D), targets and weight (S, N), modality (S,) -> (S, N) fp32.

        Entries of weight 0 (pads, masked segments) stay 0, not computed: rows are gathered before the heads.
        scope "original": stream 0 against all V ids, streams 1.. against all acoustic ids, as ESPnet trains.
        scope "grammar": only against what decoding allows: specials and text, or specials and stream 0's own
        codes, by the modality of the target's segment; in streams 1.. their codes. Much cheaper, same use.
        """
        c = self.config
        losses = torch.zeros(targets.shape, device=targets.device)          # (S, N)
        if scope == "original":
            groups = [(weight[:, 0] > 0, [slice(0, c.vocab_size)])]
        else:
            specials, live = slice(0, c.n_special), weight[:, 0] > 0
            groups = [(live & (modality == 0), [specials, slice(c.text_start, c.vocab_size)]),
                      (live & (modality == 1), [specials, slice(*c.streams[0])])]
        for live, ranges in groups:
            row = live.nonzero()[:, 0]                                      # (R,)
            ids = torch.cat([torch.arange(r.start, r.stop, device=row.device) for r in ranges])
            place = torch.zeros(c.vocab_size, dtype=torch.long, device=row.device)
            place[ids] = torch.arange(len(ids), device=row.device)          # id -> its column of the logits
            logits = self.logits(hidden[row], 0, ids)                       # (R, len(ids))
            losses[row, 0] = F.cross_entropy(logits, place[targets[row, 0]], reduction="none")
        if c.n_stream > 1:
            row = (weight[:, 1:] > 0).any(1).nonzero()[:, 0]                # (R,)
            losses[row, 1:] = self._acoustic_losses(hidden[row], targets[row, 1:], weight[row, 1:] > 0, scope)
        return losses

    def acoustic_logits(self, hidden):
        """hidden (..., D) -> (..., K, codes): the scores of streams 1.. (K = N-1) over their own codes, fp32.

        One product serves all K streams: W (h + e_n) = W h + W e_n, a stream only adds a bias to its scores.
        """
        K, (start, end) = self.config.n_stream - 1, (self.config.streams[1][0], self.config.streams[-1][1])
        head = self.lm_head[start:end].unflatten(0, (K, -1)).to(hidden.dtype)               # (K, codes, D)
        bias = (head * self.head_emb[1:, None].to(hidden.dtype)).sum(-1)                    # (K, codes)
        scores = F.linear(hidden, head.flatten(0, 1)).unflatten(-1, bias.shape) + bias      # (..., K, codes)
        return scores.float()

    def _acoustic_losses(self, hidden, targets, live, scope):
        """hidden (R, D), targets and live (R, K) -> (R, K)."""
        streams = self.config.streams[1:]
        start, end = streams[0][0], streams[-1][1]
        own_start = torch.tensor([first for first, _ in streams], device=targets.device)    # (K,)
        if scope == "original":
            head = self.lm_head[start:end].to(hidden.dtype)
            scores = F.linear(hidden, head)                                 # (R, K * codes)
            bias = F.linear(self.head_emb[1:].to(hidden.dtype), head)       # (K, K * codes)
            target = torch.where(live, targets - start, -100)               # -100: not computed
            return torch.stack([F.cross_entropy((scores + bias[n]).float(), target[:, n], reduction="none")
                                for n in range(len(bias))], 1)
        target = torch.where(live, targets - own_start, -100)               # (R, K)
        logits = self.acoustic_logits(hidden).flatten(0, 1)                 # (R * K, codes)
        return F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)


# ---- loss of a batch ---------------------------------------------------------------------------------------

def batch_loss(model, batch, scope):
    """Loss of a packed Batch (data.py): its tensors (R, S, N), modality (R, S), lengths -> (loss, report).

    loss: the weighted sum over all targets, nats, a scalar with gradient; divide by the number of frames with
    a stream-0 target. report: plain sums that add up over batches and workers, for `mean_losses`.
    """
    device = model.emb.device
    parts = (batch.tokens, batch.targets, batch.weight)
    tokens, targets, weight = (t.to(device).flatten(0, 1) for t in parts)   # (R*S, N)
    modality = batch.modality.to(device).flatten()                          # (R*S,)
    hidden = model(tokens, [length for row in batch.lengths for length in row])
    losses = model.token_losses(hidden, targets, weight, modality, scope)   # (R*S, N)
    with torch.no_grad():
        live, first = weight > 0, targets[:, 0]
        text, special = first >= model.config.text_start, first < model.config.n_special
        kinds = [live[:, 0] & text, live[:, 0] & special, live[:, 0] & ~text & ~special]    # 3 of (R*S,)
        masks = torch.cat([torch.stack(kinds, 1), live[:, 1:]], 1)          # (R*S, 3 + K)
        columns = torch.cat([losses[:, :1].expand(-1, 3), losses[:, 1:]], 1)
        report = (columns * masks).sum(0).tolist() + masks.sum(0).tolist()
    return (losses * weight).sum(), report


def mean_losses(report):
    """Summed `batch_loss` reports -> {"text": nats a token, "semantic": .., "acoustic1": ..}, as occurred."""
    half = len(report) // 2
    names = ["text", "special", "semantic"] + [f"acoustic{n}" for n in range(1, half - 2)]
    return {name: loss / count for name, loss, count in zip(names, report[:half], report[half:]) if count}
