"""Attention: positions, who may look at whom, and the key-value cache.

Third file of the reading order; it imports nothing of ours. `attend_dense` is the reference, in one call of
PyTorch; the others give the same faster: `attend_documents` on a CPU, `attend_varlen` or `attend_flash` on a
GPU, `KVCache.attend` while decoding. Dimension letters: see interleave.py.
"""
import math

import torch
import torch.nn.functional as F


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


BLOCK = 256                 # queries at a time on a CPU: small enough to skip most of what causality forbids


def attend_documents(q, k, v, lengths):
    """Causal attention inside each document of packed frames: q (S, H, E), k and v (S, G, E) -> (S, H, E).

    lengths: frames of each document, in order, summing to S. The H/G query heads that share a key-value head
    are stacked into rows of one matrix product, and no product reaches over a document's border or far into
    the future; its tested reference is SDPA with a document mask.

        keys   0 . . . . . .        queries of a block look at the keys up to the block's end;
        block  x x|                 only the last square needs a mask
               x x|x x|
    """
    S, H, E = q.shape
    G = k.shape[1]
    q = (q * E ** -0.5).view(S, G, H // G, E).permute(1, 2, 0, 3)           # (G, H/G, S, E)
    k, v = k.permute(1, 2, 0), v.transpose(0, 1)                            # (G, E, S), (G, S, E)
    longest = max(lengths)
    forbidden = torch.full((BLOCK, longest + BLOCK), -math.inf, device=q.device, dtype=q.dtype)
    forbidden = forbidden.triu(longest + 1)  # columns from longest - first on suit the block at first
    blocks = [(doc, first, min(BLOCK, length - first))                      # (document, first query, queries)
              for doc, length in enumerate(lengths) for first in range(0, length, BLOCK)]
    k, v, outputs = k.split(lengths, 2), v.split(lengths, 1), []
    for (doc, first, T), rows in zip(blocks, q.split([T for _, _, T in blocks], 2)):
        end = first + T                                                     # rows (G, H/G, T, E)
        scores = (rows.reshape(G, -1, E) @ k[doc][:, :, :end]).view(G, H // G, T, end)
        scores = scores + forbidden[:T, longest - first:longest + T]
        mixed = scores.softmax(-1).view(G, -1, end) @ v[doc][:, :end]       # (G, H/G * T, E)
        outputs.append(mixed.view(H, T, E))
    return torch.cat(outputs, 1).transpose(0, 1)                            # (S, H, E)


def attend_varlen(q, k, v, lengths):
    """The same on a GPU in bf16, by PyTorch's FlashAttention for packed documents (torch 2.14 or newer)."""
    from torch.nn.attention.varlen import varlen_attn
    ends = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    longest = max(lengths)
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)


def attend_flash(q, k, v, lengths):
    """The same by the flash-attn package, where it is installed."""
    from flash_attn import flash_attn_varlen_func
    ends = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    return flash_attn_varlen_func(q, k, v, ends, ends, max(lengths), max(lengths), causal=True)


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
        self.rope = [table.to(dtype) for table in rope_table(config, T_max, device)]    # 2 of (T_max, E)

    def attend(self, layer, q, k, v, position, mask):
        """Store k and v (B, T, G, E) at position (B, T), and attend q (B, T, H, E) to what mask shows.

        mask (B, 1, T, U) bool over the first U slots. Returns (B, T, H, E).
        """
        rows, U = torch.arange(len(q), device=q.device)[:, None], mask.shape[-1]
        self.k[layer][rows, :, position], self.v[layer][rows, :, position] = k, v
        keys, values = self.k[layer, :, :, :U], self.v[layer, :, :, :U]     # (B, G, U, E)
        return attend_dense(q.transpose(1, 2), keys, values, mask).transpose(1, 2)

    def attend_step(self, layer, q, k, v, position, end, mask):
        """The same for one frame: q (B, H, E), k and v (B, G, E), position (B,), whose largest is end - 1.

        mask (B, 1, 1, end), or None where all rows stand at one position. Query heads that share a key-value
        head are rows of one small product: nothing is expanded.
        """
        (B, H, E), G = q.shape, k.shape[1]
        if mask is None:
            self.k[layer, :, :, end - 1], self.v[layer, :, :, end - 1] = k, v
        else:
            rows = torch.arange(B, device=q.device)
            self.k[layer][rows, :, position], self.v[layer][rows, :, position] = k, v
        keys, values = self.k[layer, :, :, :end], self.v[layer, :, :, :end]
        scores = (q.reshape(B, G, H // G, E) * E ** -0.5) @ keys.mT         # (B, G, H/G, end)
        scores = scores if mask is None else scores.masked_fill_(~mask, -math.inf)
        return (scores.softmax(-1) @ values).view(B, H, E)                  # (B, H, E)
