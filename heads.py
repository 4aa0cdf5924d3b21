"""Heads: what a hidden state says about the next N tokens, and what that costs.

Second file of the reading order; it imports nothing of ours. The Transformer (model.py, next) makes one
hidden state of every frame; here it is turned into N predictions at once and into the loss that trains all
streams together (OpusLM, arXiv 2506.17611, section 2).

      hidden (S, D) + head_emb[n]  --  rows of lm_head (V, D) that stream n may say  -->  scores, loss

`model` below is model.py's Model: of it we use lm_head, head_emb and the id ranges in its config. Stream n's
head is a slice of the one shared table. Dimension letters: see interleave.py.
"""
import torch
import torch.nn.functional as F


def stream_logits(model, hidden, stream, rows):
    """Scores of ids as a stream's next token: hidden (..., D), rows: slice or ids -> (..., len) fp32.

    NOTE(espnet): stream 0 has a head_emb there too; without it the text path is the base LLM's own, so that a
    trained model is exported as a plain LLM without loss. Published checkpoints keep theirs.
    """
    if stream > 0 or model.config.published:
        hidden = hidden + model.head_emb[stream].to(hidden.dtype)
    return F.linear(hidden, model.lm_head[rows].to(hidden.dtype)).float()


def acoustic_logits(model, hidden):
    """hidden (..., D) -> (..., K, codes): the scores of streams 1.. (K = N-1) over their own codes, fp32.

    One product serves all K streams: W (h + e_n) = W h + W e_n, a stream only adds a bias to its scores.
    """
    K, (start, end) = model.config.n_stream - 1, (model.config.streams[1][0], model.config.streams[-1][1])
    head = model.lm_head[start:end].unflatten(0, (K, -1)).to(hidden.dtype)                  # (K, codes, D)
    bias = (head * model.head_emb[1:, None].to(hidden.dtype)).sum(-1)                       # (K, codes)
    scores = F.linear(hidden, head.flatten(0, 1)).unflatten(-1, bias.shape) + bias          # (..., K, codes)
    return scores.float()


# ---- the loss ----------------------------------------------------------------------------------------------

def token_losses(model, hidden, targets, weight, modality, scope):
    """Cross-entropies in nats: hidden (S, D), targets and weight (S, N), modality (S,) -> (S, N) fp32.

    Entries of weight 0 (pads, masked segments) stay 0, not computed: rows are gathered before the heads.
    scope "original": stream 0 against all V ids, streams 1.. against all acoustic ids, as ESPnet trains.
    scope "grammar": only against what decoding allows: specials and text, or specials and stream 0's own
    codes, by the modality of the target's segment; in streams 1.. their codes. Much cheaper, same use.
    """
    c = model.config
    losses = torch.zeros(targets.shape, device=targets.device)              # (S, N)
    if scope == "original":
        groups = [(weight[:, 0] > 0, [slice(0, c.vocab_size)])]
    else:
        specials, live = slice(0, c.n_special), weight[:, 0] > 0
        groups = [(live & (modality == 0), [specials, slice(*c.text)]),
                  (live & (modality == 1), [specials, slice(*c.streams[0])])]
    for live, ranges in groups:
        row = live.nonzero()[:, 0]                                          # (R,)
        ids = torch.cat([torch.arange(r.start, r.stop, device=row.device) for r in ranges])
        place = torch.zeros(c.vocab_size, dtype=torch.long, device=row.device)
        place[ids] = torch.arange(len(ids), device=row.device)              # id -> its column of the logits
        logits = stream_logits(model, hidden[row], 0, ids)                  # (R, len(ids))
        losses[row, 0] = F.cross_entropy(logits, place[targets[row, 0]], reduction="none")
    if c.n_stream > 1:
        row = (weight[:, 1:] > 0).any(1).nonzero()[:, 0]                    # (R,)
        losses[row, 1:] = _acoustic_losses(model, hidden[row], targets[row, 1:], weight[row, 1:] > 0, scope)
    return losses


def _acoustic_losses(model, hidden, targets, live, scope):
    """hidden (R, D), targets and live (R, K) -> (R, K)."""
    streams = model.config.streams[1:]
    start, end = streams[0][0], streams[-1][1]
    own_start = torch.tensor([first for first, _ in streams], device=targets.device)        # (K,)
    if scope == "original":
        head = model.lm_head[start:end].to(hidden.dtype)
        scores = F.linear(hidden, head)                                     # (R, K * codes)
        bias = F.linear(model.head_emb[1:].to(hidden.dtype), head)          # (K, K * codes)
        target = torch.where(live, targets - start, -100)                   # -100: not computed
        return torch.stack([F.cross_entropy((scores + bias[n]).float(), target[:, n], reduction="none")
                            for n in range(len(bias))], 1)
    target = torch.where(live, targets - own_start, -100)                   # (R, K)
    logits = acoustic_logits(model, hidden).flatten(0, 1)                   # (R * K, codes)
    return F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)


def batch_loss(model, batch, scope):
    """Loss of a packed Batch (data.py): its tensors (R, S, N), modality (R, S), lengths -> (loss, report).

    loss: the weighted sum over all targets, nats, a scalar with gradient; divide by the number of frames with
    a stream-0 target. report: plain sums that add up over batches and workers, for `mean_losses`.
    """
    device, c = model.emb.device, model.config
    parts = (batch.tokens, batch.targets, batch.weight)
    tokens, targets, weight = (t.to(device).flatten(0, 1) for t in parts)   # (R*S, N)
    modality = batch.modality.to(device).flatten()                          # (R*S,)
    hidden = model(tokens, [length for row in batch.lengths for length in row])
    losses = token_losses(model, hidden, targets, weight, modality, scope)  # (R*S, N)
    with torch.no_grad():
        live, first = weight > 0, targets[:, 0]
        text, special = first >= c.text[0], first < c.n_special
        kinds = [live[:, 0] & text, live[:, 0] & special, live[:, 0] & ~text & ~special]    # 3 of (R*S,)
        masks = torch.cat([torch.stack(kinds, 1), live[:, 1:]], 1)          # (R*S, 3 + K)
        columns = torch.cat([losses[:, :1].expand(-1, 3), losses[:, 1:]], 1)
        report = (columns * masks).sum(0).tolist() + masks.sum(0).tolist()
    return (losses * weight).sum(), report


def mean_losses(report, stream_names):
    """Summed `batch_loss` reports -> {"text": nats a token, "semantic": .., "acoustic1": ..}, as occurred."""
    names, half = ["text", "special", *stream_names], len(report) // 2
    return {name: loss / count for name, loss, count in zip(names, report[:half], report[half:]) if count}
