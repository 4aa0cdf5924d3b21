"""Decode: one step of the model per frame, as fast as the memory gives out the weights.

Thirteenth file of the reading order. Decoding follows the released models (ESPnet-SpeechLM, arXiv
2502.15218): the marker of the wanted modality is given, each stream may only choose its own ids, and after
the end token N-1 more steps bring in the delayed acoustic tokens. A step at small batch sizes reads every
weight once and computes little, so what counts is bytes: only the head rows that the grammar allows are
read, weights lie in the order in which a thin matrix product reads them, and int8 weights are a quarter of
fp32's.
"""
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import KVCache, rotate
from heads import acoustic_rows
from interleave import EOS, PAD, SPEECH, delay


def pick(logits, temperature, top_k, generator=None, top_p=1.0):
    """One id of each row: logits (..., C) -> (...). The best at temperature 0, else a draw of the top k, and
    of those the likeliest that together reach the probability top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    best, ids = logits.topk(min(top_k, logits.shape[-1]))                   # (..., k)
    p = (best / temperature).softmax(-1)
    if top_p < 1:
        p = p * (p.cumsum(-1) - p < max(top_p, 1e-9))                       # the best one always stays
    choice = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
    return ids.gather(-1, choice.view(*ids.shape[:-1], 1))[..., 0]


# ---- weights for decoding ----------------------------------------------------------------------------------

class Int8Linear(nn.Module):
    """A matrix in int8 with a scale per row; its input is quantised as it comes, per call. CPU only."""

    def __init__(self, weight):
        super().__init__()
        if not hasattr(torch, "quantize_per_channel"):      # announced in torch 2.14
            raise ValueError("this PyTorch has dropped its int8 products: decode without quant")
        able = torch.cpu.get_capabilities()
        self.reduce_range = not (able.get("avx512_vnni") or able.get("avx_vnni"))     # 7 bits: no overflow
        torch.backends.quantized.engine = "x86"
        scale = weight.float().abs().amax(1).clamp_min(1e-8) / 127                          # (n_out,)
        zero = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # of the same announcement
            matrix = torch.quantize_per_channel(weight.float().contiguous(), scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(matrix, None)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed, self.reduce_range).to(x.dtype)


class Columns(nn.Module):
    """A matrix (n_out, n_in), its memory ordered by columns: with few rows of x, a CPU makes x W^T from it up
    to seven times as fast (measured, LOG.md)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight.t().contiguous().t()

    def forward(self, x):
        return F.linear(x, self.weight)


def rms(x, norm):
    """`norm` of x (B, D) in small operations, a fifth of the library's time on a CPU; Identity stays."""
    if isinstance(norm, nn.Identity):
        return x
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)           # (B, 1)
    scale = size.square_().mul_(1 / x.shape[-1]).add_(norm.eps).rsqrt_()
    return x * scale.to(x.dtype) * norm.weight


class StepBlock:
    """model.Block for single steps: four products instead of seven, one rotation for q and k together.

    Its numbers are those of Block.forward with KVCache.attend (tested). A step of a small model on a CPU
    costs as much in calls as in arithmetic.
    """

    def __init__(self, block, quant):
        matrix = Int8Linear if quant else Columns
        join = lambda *names: matrix(torch.cat([getattr(block, name).weight.data for name in names]))
        self.block, self.sizes = block, [block.n_head + block.n_kv_head, block.n_kv_head]
        self.qkv, self.out = join("q_proj", "k_proj", "v_proj"), join("o_proj")
        self.up, self.down = join("gate_proj", "up_proj"), join("down_proj")
        if not quant:                       # the block's own matrices become views of the joint ones
            for joint, names in ((self.qkv, "qkv"), (self.out, "o"), (self.up, ("gate", "up")),
                                 (self.down, ["down"])):
                start = 0
                for name in names:
                    weight = getattr(block, f"{name}_proj").weight
                    weight.data = joint.weight[start:start + len(weight)]
                    start += len(weight)

    def __call__(self, x, cos, sin, attend):
        """x (B, D), cos and sin (B, 1, E), attend(q (B, H, E), k, v (B, G, E)) -> (B, H, E); -> (B, D)."""
        block, E = self.block, self.block.head_dim
        qkv = self.qkv(rms(x, block.attn_norm))                             # (B, (H + 2 G) E)
        if not isinstance(block.q_norm, nn.Identity):
            q, k, v = qkv.split([block.n_head * E, block.n_kv_head * E, block.n_kv_head * E], -1)
            qkv = torch.cat([rms(q, block.q_norm), rms(k, block.k_norm), v], -1)
        qk, v = qkv.unflatten(-1, (-1, E)).split(self.sizes, 1)             # (B, H + G, E), (B, G, E)
        qk = rotate(qk, cos, sin)
        mixed = attend(qk[:, :block.n_head], qk[:, block.n_head:], v)
        x = x + rms(self.out(mixed.flatten(1)), block.attn_out_norm)
        gate, up = self.up(rms(x, block.mlp_norm)).chunk(2, -1)
        return x + rms(self.down(F.silu(gate).mul_(up)), block.mlp_out_norm)


def step(model, tokens, cache, position):
    """`model.extend` by one row, fast: tokens (B, N), position (B,) -> hidden (B, D)."""
    x = model.embed(tokens)                                                 # (B, D)
    cos, sin = (table[position, None] for table in cache.rope)              # (B, 1, E)
    end = int(position.max()) + 1
    even = bool((position == position[0]).all())                            # then the mask hides nothing
    mask = None if even else torch.arange(end, device=x.device) <= position[:, None, None, None]
    for layer, block in enumerate(model.step_blocks):
        x = block(x, cos, sin, lambda q, k, v: cache.attend_step(layer, q, k, v, position, end, mask))  # noqa: B023
    return rms(x, model.norm)


def prepare_for_decoding(model, quant=""):
    """Join and lay out the blocks' matrices for single steps; quant "int8": in int8. Returns the model."""
    if quant not in ("", "int8"):
        raise ValueError(f"quant is 'int8' or nothing, not {quant!r}")
    if quant and model.emb.device.type != "cpu":
        raise ValueError("int8 decoding is for CPUs")
    model.to(model.dtype).eval().requires_grad_(False)
    model.quant, model.step_blocks = quant, [StepBlock(block, quant) for block in model.blocks]
    model.decoding_heads = {}               # by modality, made when first needed
    return model


class DecodingHeads:
    """The head rows that one modality allows, as one matrix: hidden (B, D) -> scores of the streams."""

    def __init__(self, model, modality):
        device, c = model.emb.device, model.config
        own = c.streams[0] if modality == SPEECH else c.text
        self.ids = torch.cat([torch.tensor([EOS]), torch.arange(*own)]).to(device)      # of stream 0
        self.n_first, table = len(self.ids), model.lm_head[self.ids]
        self.first_bias = table @ model.head_emb[0] if c.published else 0
        self.K, self.bias = 0, None
        if modality == SPEECH and c.n_stream > 1:
            self.K = c.n_stream - 1
            codes, self.bias = acoustic_rows(model)                                     # (K * codes, D)
            table = torch.cat([table, codes])
        self.table = (Int8Linear if model.quant else Columns)(table)

    def __call__(self, hidden):
        """hidden (B, D) -> stream 0's scores of self.ids (B, 1 + own), the others' (B, K, codes) or None."""
        scores = self.table(hidden)
        first = scores[:, :self.n_first].float() + self.first_bias
        if not self.K:
            return first, None
        return first, scores[:, self.n_first:].unflatten(1, (self.K, -1)).float() + self.bias


def decoding_heads(model, modality):
    """The DecodingHeads of a prepared model, made when first needed."""
    if not hasattr(model, "step_blocks"):
        raise ValueError("decoding lays out a model's weights anew: call prepare_for_decoding(model) first")
    if modality not in model.decoding_heads:
        model.decoding_heads[modality] = DecodingHeads(model, modality)
    return model.decoding_heads[modality]


# ---- generation --------------------------------------------------------------------------------------------

@torch.no_grad()
def steps(model, vocab, prefixes, modality, max_frames, min_frames=1, temperature=0.0,
          acoustic_temperature=0.0, top_k=30, generator=None, top_p=1.0, unguided=None, guidance=1.0):
    """Go on from aligned prefixes [(T_i, N)], step by step; yields (frames, known, eos) after each.

    max_frames, min_frames: numbers, or one for each prefix.
    frames (B, T_max, N): aligned ids so far.  known (B,): frames of each prefix.  eos (B,): where each
    ended, or may end at most. Frame t of a row is complete once step t - known + N - 1 is done. A step
    predicts the delayed row t: stream n's entry belongs to frame t - n. It is one of three things:
        frame t - n < prefix   known already (pads after a marker; acoustic tokens still due)
        frame t - n >= eos     pad
        else                   sampled, by the mask of its stream
    Classifier-free guidance (Ho and Salimans 2022): a prefix `unguided` (T, N), which lacks what the others
    say, is gone on from beside each of them, with the same new frames (R = 2B rows instead of R = B). A token
    is chosen by log p = u + guidance (c - u), c after the row's own prefix, u after the unguided one: over 1,
    what follows from the prefix counts for more.
    """
    if guidance != 1 and unguided is None:
        raise ValueError("guidance away from what? give the unguided prefix too")
    heads = decoding_heads(model, modality)
    B, twins = len(prefixes), 1 if guidance == 1 else 2
    prefixes = [*prefixes, *[unguided] * (B * (twins - 1))]
    R, N, device = len(prefixes), vocab.n_stream, model.emb.device
    known = torch.tensor([len(prefix) for prefix in prefixes], device=device)               # (R,)
    if known.min() == 0:
        raise ValueError("nothing to start from: give at least one token")
    limit, at_least = (torch.as_tensor(n, device=device).expand(B).repeat(twins)            # (R,)
                       for n in (max_frames, min_frames))
    longest, max_frames = int(known.max()), int(limit.max())
    frames = torch.full((R, longest + max_frames + N, N), PAD, device=device)               # aligned
    for r, prefix in enumerate(prefixes):
        frames[r, :len(prefix)] = prefix
    cache = KVCache(model.config, R, longest + max_frames + N, device, model.dtype)
    delayed = delay(frames, vocab.delay)[:, :longest]                                       # (R, longest, N)
    hidden = model.extend(delayed, cache, torch.zeros_like(known))                          # (R, longest, D)
    rows, streams = torch.arange(R, device=device), torch.arange(N, device=device)
    hidden = hidden[rows, known - 1]                                                        # (R, D)

    starts = vocab.starts.to(device)
    drain = vocab.delay * (N - 1) if modality == SPEECH else 0
    eos = known + limit                                                                     # where eos stands
    for count in range(max_frames + drain):
        t = known + count                                                   # (R,) the row to predict
        row = torch.full((R, N), PAD, device=device)
        first, acoustic = (guide(scores, guidance) for scores in heads(hidden))             # (B, ...)
        first[count < at_least[:B], 0] = -torch.inf
        row[:, 0] = heads.ids[pick(first, temperature, top_k, generator, top_p)].repeat(twins)
        if acoustic is not None:
            codes = pick(acoustic, acoustic_temperature, top_k, generator, top_p)           # (B, K)
            row[:, 1:] = codes.repeat(twins, 1) + starts[1:]
        eos = torch.where((row[:, 0] == EOS) & (t < eos), t, eos)
        frame = t[:, None] - vocab.delay * streams                                          # (R, N)
        given = frame < known[:, None]
        row = torch.where(given, frames[rows[:, None], frame, streams], row)
        row = torch.where((frame >= eos[:, None]) & ~given, PAD, row)
        frames[rows[:, None], frame, streams] = row
        yield frames[:B], known[:B], eos[:B]
        if (t + 1 >= eos + drain).all():
            break
        row[:, 0] = torch.where(t == eos, EOS, row[:, 0])
        hidden = step(model, row, cache, t)                                                 # (R, D)


def guide(scores, guidance):
    """Scores (2B, ...) after prefixes and then after the unguided one -> (B, ...), see `steps`; None stays,
    and with guidance 1 there are no twins. Scores are log p but for a constant, which changes no choice."""
    if scores is None or guidance == 1:
        return scores
    given, free = scores.chunk(2)                                                           # (B, ...) each
    return free + guidance * (given - free)


def generate(model, vocab, prefixes, modality, max_frames, *options, **named):
    """All `steps` -> [(frames (L, N), ended)]: the new aligned frames without eos, and whether eos came by
    itself within max_frames. Options as of `steps`."""
    for state in steps(model, vocab, prefixes, modality, max_frames, *options, **named):
        frames, known, eos = state
    ended = (eos < known + torch.as_tensor(max_frames, device=eos.device)).tolist()
    return [(frames[b, known[b]:eos[b]].cpu(), ended[b]) for b in range(len(prefixes))]


@torch.no_grad()
def beam_search(model, vocab, prefix, modality, max_frames, beam=4):
    """The likeliest continuation of one aligned prefix (T, N), in stream 0, that a beam finds -> (frames
    (L, N), ended). By the mean log probability of its tokens and its end: short ones have no advantage. It
    ends when so many have ended as the beam is wide, and none that goes on is ahead of the best of them by
    its mean so far: one could still overtake, by tokens that are likelier than those before."""
    heads = decoding_heads(model, modality)
    device, known = model.emb.device, len(prefix)
    frames = torch.full((1, known + max_frames + vocab.n_stream, vocab.n_stream), PAD, device=device)
    frames[0, :known] = prefix
    cache = KVCache(model.config, 1, frames.shape[1], device, model.dtype)
    start = torch.zeros(1, dtype=torch.long, device=device)
    hidden = model.extend(delay(frames, vocab.delay)[:, :known], cache, start)[:, -1]       # (1, D)
    total, finished = torch.zeros(1, device=device), []
    for count in range(max_frames):
        scores = heads(hidden)[0].log_softmax(-1) + total[:, None]                          # (beams, V)
        total, best = scores.flatten().topk(min(2 * beam, scores.numel()))
        parent, token = best // scores.shape[1], heads.ids[best % scores.shape[1]]
        for k in (token[:beam] == EOS).nonzero()[:, 0].tolist():
            finished.append((float(total[k]) / (count + 1), frames[parent[k], known:known + count].clone()))
        going = (token != EOS).nonzero()[:beam, 0]
        total, parent, token = total[going], parent[going], token[going]
        done = max((score for score, _ in finished), default=-torch.inf)
        if len(finished) >= beam and float(total.max()) / (count + 1) < done:
            break
        frames = frames[parent]
        frames[:, known + count, 0] = token
        cache.k, cache.v = cache.k[:, parent], cache.v[:, parent]           # each goes on from its parent
        hidden = step(model, frames[:, known + count], cache, torch.full_like(token, known + count))
    if not finished:
        return frames[int(total.argmax()), known:known + max_frames].cpu(), False
    return max(finished, key=lambda found: found[0])[1].cpu(), True
