"""Heads: what a hidden state says about the next N tokens, and what that costs.

Second file of the reading order; it imports nothing of ours. The Transformer (model.py) makes one
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


def acoustic_rows(model):
    """What streams 1.. (K = N-1) need to score their own codes: rows (K * codes, D), bias (K, codes).

    One product serves all K streams: W (h + e_n) = W h + W e_n, a stream only adds a bias to its scores.
    """
    c = model.config
    rows = model.lm_head[c.streams[1][0]:c.streams[-1][1]]
    own = rows.unflatten(0, (c.n_stream - 1, -1))                           # (K, codes, D)
    return rows, (own * model.head_emb[1:, None]).sum(-1)


# ---- the loss, plain ---------------------------------------------------------------------------------------

def token_losses(model, hidden, targets, weight, modality, scope):
    """Cross-entropies in nats: hidden (S, D), targets and weight (S, N), modality (S,): of a
    target's segment, 0 text, 1 speech -> (S, N) fp32.

    Entries of weight 0 (pads, masked segments) are 0. The reference that `weighted_loss` is tested against.
    scope "original": stream 0 against all V ids, streams 1.. against all acoustic ids, as ESPnet trains.
    scope "grammar": only against what decoding allows: specials and text, or specials and stream 0's own
    codes, by the modality of the target's segment; in streams 1.. their codes. Much cheaper, same use.
    """
    c, losses = model.config, []
    ids = torch.arange(c.vocab_size, device=hidden.device)
    inside = lambda start, end: (ids >= start) & (ids < end)                # (V,)
    for n in range(c.n_stream):
        if n > 0:
            allowed = inside(*(c.streams[n] if scope == "grammar" else (c.streams[1][0], c.streams[-1][1])))
        elif scope == "original":
            allowed = inside(0, c.vocab_size)
        else:
            said = torch.stack([inside(*c.text), inside(*c.streams[0])])[modality.long()]   # (S, V)
            allowed = said | inside(0, c.n_special)
        logits = stream_logits(model, hidden, n, slice(0, c.vocab_size)).masked_fill(~allowed, -torch.inf)
        target = torch.where(weight[:, n] > 0, targets[:, n], -100)         # -100: not computed
        losses.append(F.cross_entropy(logits, target, reduction="none"))
    return torch.stack(losses, 1)                                           # (S, N)


# ---- the loss, fused ---------------------------------------------------------------------------------------

CHUNK = 2 ** 24             # scores held at a time, whatever the vocabulary: 64 MB in fp32
ROWS = 64                   # chunks are filled up to a multiple: for each new shape in bf16 oneDNN, PyTorch's
                            # library on CPUs, keeps as much memory as the table takes


def own_softmax(scores, target, weight):
    """scores (r, k, C), target and weight (r, k) -> losses (r, k), d(sum of weight * loss) / d scores."""
    total = scores.logsumexp(-1, keepdim=True)
    losses = (total - scores.gather(-1, target[..., None]))[..., 0] * (weight > 0)
    gradient = (scores - total).exp_().mul_(weight[..., None])
    return losses, gradient.scatter_add_(-1, target[..., None], -weight[..., None])


def shared_softmax(scores, bias, target, weight):
    """`own_softmax` of scores[:, None] + bias, for scores (r, C) that K streams share and bias (K, C).

    -> losses (r, K), gradients of scores (r, C) and of bias (K, C). With exp(s + b) = exp(s) exp(b), sums
    over streams and over codes are matrix products, and no (r, K, C) tensor is made: an eighth of the work.
    (A sum would vanish if all codes that its bias favours lay 87 nats below the best; we have not met that.)
    """
    best, best_bias = scores.amax(1, keepdim=True), bias.amax(1)            # (r, 1), (K,)
    e, a = (scores - best).exp_(), (bias - best_bias[:, None]).exp_()       # (r, C), (K, C)
    sums = e @ a.T                                                          # (r, K)
    said = scores.gather(1, target) + bias.gather(1, target.T).T            # (r, K)
    losses = (sums.log() + best + best_bias - said) * (weight > 0)
    share = weight / sums                                                   # (r, K)
    bias_gradient = (share.T @ e).mul_(a).scatter_add_(1, target.T, -weight.T)
    return losses, e.mul_(share @ a).scatter_add_(1, target, -weight), bias_gradient


class LinearCrossEntropy(torch.autograd.Function):
    """Scores of rows of a table, and cross-entropies of all streams, with their gradients, chunk by chunk.

        hidden (r, D) table^T = scores (r, C)   | prefix: stream 0    |
                                                       | window: streams 1.. |

    The scores of r rows are made, turned into losses and gradients, and thrown away, so that memory does not
    grow with the vocabulary. One product serves all streams: W (h + e_n) = W h + W e_n, a stream only adds a
    bias; so do the gradients, which are added up before they are multiplied with the table.
    """

    @staticmethod
    def forward(ctx, hidden, table, bias0, bias, target, weight, n_acoustic, prefix, window, with_gradient):
        """hidden (R, D), table (C, D), bias0 (prefix,) or None, bias (K, width), target, weight (R, 1 + K).

        The first n_acoustic rows have targets in streams 1.. too. target: columns within the prefix and, for
        streams 1.., within a stream's part of the window: of equal parts, or the whole of it for each stream.
        Returns sum of weight * loss, and losses (R, 1 + K) as a report.
        """
        W, (start, end), (R, C) = table.to(hidden.dtype), window, (len(hidden), len(table))
        losses = torch.zeros(weight.shape, device=hidden.device)
        inputs = [hidden, table, bias0, bias]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        g_hidden, g_table, g_bias0, g_bias = ctx.gradients = [          # sums of many chunks, so in fp32
            None if x is None or not with_gradient else torch.zeros_like(x, dtype=torch.float32)
            for x in inputs]
        step = max(1, CHUNK // C // ROWS) * ROWS
        for row in [*range(0, n_acoustic, step), *range(n_acoustic, R, step)]:
            acoustic = row < n_acoustic
            rows = slice(row, min(row + step, n_acoustic if acoustic else R))
            n = rows.stop - row
            h, t, w = (F.pad(x[rows], (0, 0, 0, -n % ROWS)) for x in (hidden, target, weight))
            scores = (h @ W.T).float()                                      # (r, C), r = n filled up
            own = scores[:, :prefix] if bias0 is None else scores[:, :prefix] + bias0
            of_first, first = own_softmax(own[:, None], t[:, :1], w[:, :1])
            if with_gradient and bias0 is not None:
                g_bias0 += first.sum((0, 1))                              # before slope, a view of it, grows
            slope = first[:, 0] if prefix == C else F.pad(first[:, 0], (0, C - prefix))     # (r, C)
            if acoustic and bias.shape[1] == end - start:                   # one softmax over the window
                of_others, others, of_bias = shared_softmax(scores[:, start:end], bias, t[:, 1:], w[:, 1:])
                slope[:, start:end] += others
            elif acoustic:                                                  # a part of the window for each
                parts = scores[:, start:end].unflatten(1, bias.shape) + bias                # (r, K, width)
                of_others, others = own_softmax(parts, t[:, 1:], w[:, 1:])
                of_bias = others.sum(0)
                slope[:, start:end] += others.flatten(1)
            losses[rows, :1] = of_first[:n]
            if acoustic:
                losses[rows, 1:] = of_others[:n]
            if with_gradient:
                slope = slope.to(hidden.dtype)
                g_hidden[rows] = (slope @ W)[:n]
                g_table += slope.T @ h
                if acoustic:
                    g_bias += of_bias
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum(), losses

    @staticmethod
    def backward(ctx, upstream, _):
        gradients, ctx.gradients = ctx.gradients, None         # as large as the tables: not kept any longer
        scaled = (g if g is None else g.mul_(upstream).to(like) for g, like in zip(gradients, ctx.dtypes))
        return *scaled, *[None] * 6


def weighted_loss(model, hidden, targets, weight, modality, scope):
    """The loss that trains: arguments as of `token_losses` -> (sum of weight * loss, losses (S, N) detached).

    Rows are gathered before the heads; what is not predicted costs nothing.
    """
    c, head, e = model.config, model.lm_head, model.head_emb
    K, specials = c.n_stream - 1, c.n_special
    first, acoustic = weight[:, 0] > 0, (weight[:, 1:] > 0).any(1)          # (S,)
    window = (c.streams[1][0], c.streams[-1][1]) if K else (0, 0)
    own = torch.tensor([start for start, _ in c.streams[1:]], dtype=torch.long, device=hidden.device)   # (K,)
    bias = e.new_zeros(0, 0)                                                # (K, a stream's codes)
    if scope == "original":
        own = torch.full_like(own, window[0])
        bias = e[1:] @ head[slice(*window)].T if K else bias
        jobs = [(first, acoustic, head, len(head), 0)]      # rows for stream 0, for the others, table, ...
    else:
        bias = acoustic_rows(model)[1] if K else bias
        text = torch.cat([head[:specials], head[slice(*c.text)]])
        jobs = [(first & (modality == 1), acoustic, head[:c.streams[-1][1]], c.streams[0][1], 0),
                (first & (modality == 0), torch.zeros_like(acoustic), text, len(text), c.text[0] - specials)]
    losses = torch.zeros(weight.shape, device=hidden.device)
    total = 0 * (hidden.sum() + e.sum())
    for live, tail, table, prefix, gap in jobs:
        with_codes, without = tail.nonzero()[:, 0], (live & ~tail).nonzero()[:, 0]
        row = torch.cat([with_codes, without])                              # (R,)
        if len(row) == 0:
            continue
        count = weight[row] * torch.cat([live[row, None], tail[row, None].expand(-1, K)], 1)    # (R, N)
        target = targets[row].clone()
        target[:, 0] -= (target[:, 0] >= specials) * gap                    # ids become columns of the table
        target[:, 1:] -= own
        target = torch.where(count > 0, target, 0)
        bias0 = table[:prefix] @ e[0] if c.published else None
        loss, of_row = LinearCrossEntropy.apply(hidden[row], table, bias0, bias, target, count,
                                                len(with_codes), prefix, window, torch.is_grad_enabled())
        total = total + loss
        losses[row] += of_row
    if not (first | acoustic).any():        # every parameter gets a gradient, from every worker
        total = total + 0 * head.sum()
    return total, losses


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
    loss, losses = weighted_loss(model, hidden, targets, weight, modality, scope)           # (), (R*S, N)
    with torch.no_grad():
        live, first = weight > 0, targets[:, 0]
        text, special = first >= c.text[0], first < c.n_special
        kinds = [live[:, 0] & text, live[:, 0] & special, live[:, 0] & ~text & ~special]    # 3 of (R*S,)
        masks = torch.cat([torch.stack(kinds, 1), live[:, 1:]], 1)          # (R*S, 3 + K)
        columns = torch.cat([losses[:, :1].expand(-1, 3), losses[:, 1:]], 1)
        report = (columns * masks).sum(0).tolist() + masks.sum(0).tolist()
    return loss, report


def mean_losses(report, stream_names):
    """Summed `batch_loss` reports -> {"text": nats a token, "semantic": .., "acoustic1": ..}, as occurred."""
    names, half = ["text", "special", *stream_names], len(report) // 2
    return {name: loss / count for name, loss, count in zip(names, report[:half], report[half:]) if count}
