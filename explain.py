"""Explain: look inside one utterance, in one HTML page that opens from disk.

Helper of sample.py:
  python sample.py out/numbers tts "seven three five" --prompt voice.wav --explain page.html
  python sample.py out/numbers asr voice.wav --explain page.html
The model reads the finished sequence once more, and we note what it thought of each token when it had to say
it: the token's probability, the entropy of what else it might have said, and where a head of attention looked
between text and speech. Of all heads we show the one that follows the speech best, or --head=LAYER,HEAD.
"""
import base64
import html
import io
import os

import numpy as np
import soundfile
import torch

from heads import stream_logits
from interleave import N_SPECIAL, TEXT, build_sequence, speech_frames, training_rows, undelay
from plot import in_grey
from tokenize_audio import SAMPLE_RATE, load_audio, save_audio

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.4em; margin-bottom: 0; } h2 { font-size: 1.1em; margin-top: 2em; }
p.about { margin-top: .3em; opacity: .75; } audio { max-width: 100%; }
img { width: 100%; min-width: 760px; height: auto; }
.words span, td { color: #111; } .words span { padding: 1px 3px; border-radius: 3px; white-space: pre; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font: 11px/1.3 ui-monospace, monospace; }
td, th { padding: 1px 4px; text-align: right; border: 1px solid #8884; } th { position: sticky; left: 0;
background: Canvas; font-weight: normal; }
"""


@torch.no_grad()
def inside(model, tokens, targets, weight, modality, use):
    """One document's training rows -> probability and entropy in bits of each target, both (S, N), NaN where
    there is none; and the attention of all heads: use(layer, (H, S, S)) is called with each layer's."""
    c, layers, attend = model.config, iter(range(model.config.n_layer)), model.attend
    S, N = targets.shape

    def spy(q, k, v, lengths):                          # q (S, H, E), k (S, G, E): rotated already
        H, G, E = q.shape[1], k.shape[1], q.shape[2]
        keys = k.repeat_interleave(H // G, 1).permute(1, 2, 0)                  # (H, E, S)
        scores = (q.transpose(0, 1) @ keys).float() * E ** -0.5                 # (H, S, S)
        future = torch.ones(S, S, dtype=torch.bool).triu(1)
        use(next(layers), scores.masked_fill_(future, -torch.inf).softmax(-1))
        return attend(q, k, v, lengths)

    model.attend = spy
    try:
        hidden = model(tokens, [S])                                             # (S, D)
    finally:
        model.attend = attend
    probability, entropy = torch.full((2, S, N), torch.nan)
    special = torch.arange(N_SPECIAL)
    for n in range(N):
        for kind in (0, 1):                             # text, speech: what stream 0 may say depends on it
            rows = ((weight[:, n] > 0) & (modality == kind)).nonzero()[:, 0]
            ids = torch.arange(*c.streams[n])
            if n == 0:
                ids = torch.cat([special, torch.arange(*c.text) if kind == TEXT else ids])
            if len(rows):
                p = stream_logits(model, hidden[rows], n, ids).softmax(-1)      # (rows, ids)
                column = torch.searchsorted(ids, targets[rows, n])
                probability[rows, n] = p.gather(1, column[:, None])[:, 0]
                entropy[rows, n] = -(p * p.clamp_min(1e-30).log2()).sum(-1)
    return probability, entropy


class Alignment:
    """Where the attention of rows falls among columns; keeps the map of one head: the best, or `head`."""

    def __init__(self, rows, columns, head=None):
        self.rows, self.columns, self.wanted, self.best = rows, columns, head, -1.0
        self.layer = self.head = self.map = None

    def __call__(self, layer, attention):
        """attention (H, S, S): how much of it falls on columns, and does its centre move with the rows?"""
        part = attention[:, self.rows][:, :, self.columns]                      # (H, rows, columns)
        mass = part.sum(-1)                                                     # (H, rows)
        centre = (part @ torch.arange(len(self.columns)).float()) / mass.clamp_min(1e-9)
        for h in range(len(part)):
            follows = np.corrcoef(centre[h], np.arange(len(self.rows)))[0, 1] if len(self.rows) > 2 else 1.0
            score = float(mass[h].mean()) * max(0.0, float(np.nan_to_num(follows)))
            if (self.wanted == (layer, h)) if self.wanted else score > self.best:
                self.best, self.layer, self.head, self.map = score, layer, h, part[h].numpy()


def look(speaker, task, entries, head=None):
    """Build the document of a task from its entries and look inside.

    Returns aligned tokens (T, N), probability and entropy (T, N) on the same places, the places (M,) of
    speech and text frames among the T, and the Alignment.
    """
    vocab, N = speaker.vocab, speaker.vocab.n_stream
    document = build_sequence(vocab, task, entries, "target")
    tokens, targets, weight, modality = training_rows([document], vocab.weights(), vocab.delay)
    aligned = document[0]                                                       # (T, N)
    kind = aligned[:, 0]
    first = len(aligned) - N - len(entries["speech"]) if task != "asr" else 3   # of the speech itself
    speech = torch.arange(first, first + len(entries["speech"]))
    text = ((kind >= vocab.text[0]) & (kind < vocab.text[1])).nonzero()[:, 0]
    said, source = (speech, text) if task != "asr" else (text, speech)
    alignment = Alignment(said - 1, source, head)       # row t predicts row t + 1
    probability, entropy = inside(speaker.model, tokens, targets, weight, modality, alignment)
    if alignment.map is None:
        c = speaker.model.config
        raise ValueError(f"there is no head {head}: this model has {c.n_layer} layers of {c.n_head} heads")
    nothing = torch.full((1, N), torch.nan)
    back = lambda x: undelay_values(torch.cat([nothing, x]), vocab.delay)       # (T, N)
    return aligned, back(probability), back(entropy), speech, text, alignment


def undelay_values(values, by):
    """`undelay` of real numbers (T, N), NaN where nothing is."""
    moved = undelay(torch.nan_to_num(values, nan=-1.0) + 1, by)                 # pad is 0 there
    return torch.where(moved > 0, moved - 1, torch.nan)


# ---- the page ----------------------------------------------------------------------------------------------

def colour(p):
    """Probability -> CSS colour from red over yellow to green; grey where nothing was said."""
    return "#ccc" if np.isnan(p) else f"hsl({120 * p:.0f} 75% 70%)"


def picture(task, wav, names, seen, text):
    """Spectrogram, probabilities, entropies and attention over one axis of time -> PNG as a data URI."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    _, probability, entropy, speech, _, alignment = seen
    n_row = 4 if task != "asr" else 2
    heights = [3, 2, 2, 3] if task != "asr" else [3, 4]
    figure, axes = plt.subplots(n_row, 1, figsize=(12, 2.4 * n_row), height_ratios=heights, sharex=True,
                                layout="constrained")
    seconds = len(wav) / SAMPLE_RATE
    axes[0].specgram(wav, NFFT=512, Fs=SAMPLE_RATE, noverlap=352, vmin=-140, cmap="magma")
    axes[0].set(ylabel="Hz", title="spectrogram")
    if task != "asr":
        shown = ((probability, 1, "viridis", "probability of the token said"),
                 (entropy, None, "cividis", "entropy in bits: how undecided the model was"))
        for axis, (values, top, colours, title) in zip(axes[1:], shown):
            image = axis.imshow(values[speech].T.numpy(), aspect="auto", vmin=0, vmax=top,          # (N, L)
                                cmap=colours, interpolation="nearest",
                                extent=(0, seconds, len(names) - 0.5, -0.5))
            axis.set(yticks=range(len(names)), yticklabels=names, title=title)
            in_grey(figure.colorbar(image, ax=axis, pad=0.01).ax)
    where = alignment.map.T if task != "asr" else alignment.map                 # (text, speech)
    axes[-1].imshow(where, aspect="auto", cmap="viridis", interpolation="nearest",
                    extent=(0, seconds, len(where) - 0.5, -0.5))
    axes[-1].set(yticks=range(len(text)), yticklabels=text, xlabel="seconds",
                 title=f"attention between text and speech, layer {alignment.layer}, head {alignment.head}")
    for axis in axes:
        in_grey(axis)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, transparent=True)
    plt.close(figure)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def player(name, wav):
    out = io.BytesIO()
    soundfile.write(out, wav, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return (f"<p>{name}<br><audio controls src='data:audio/wav;base64,"
            f"{base64.b64encode(out.getvalue()).decode()}'></audio></p>")


def page(speaker, task, text, wavs, entries, about, head=None):
    """One utterance as an HTML page.

    text: what was said or read.  wavs: {name: wav (n,)}, the one in question first.  entries: joint-id frames
    of the task, see interleave.build_sequence.  about: a line on how it came about.
    """
    vocab, names = speaker.vocab, speaker.vocab.stream_names
    seen = look(speaker, task, entries, head)
    aligned, probability, entropy, places, text_places, _ = seen
    ids = (aligned[text_places, 0] - vocab.text_start).tolist()
    words = [speaker.text_tokenizer.decode([i]) or str(i) for i in ids]
    shown = "".join(f"<span style='background:{colour(float(probability[t, 0]))}' title='token {i}, p = "
                    f"{float(probability[t, 0]):.2f}'>{html.escape(word)}</span> "
                    for t, i, word in zip(text_places, ids, words))
    rows = []
    for n, name in enumerate(names):
        p, bits = probability[places, n].tolist(), entropy[places, n].tolist()
        codes = (aligned[places, n] - vocab.streams[n][0]).tolist()             # below 0: pad, nothing said
        cells = "".join(f"<td style='background:{colour(p[k])}' title='frame {k}, p = {p[k]:.2f}, "
                        f"{bits[k]:.1f} bits'>{code}</td>" if code >= 0 else "<td></td>"
                        for k, code in enumerate(codes))
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    first = next(iter(wavs.values()))
    image = picture(task, first, names, seen, words)
    coloured = "; green: sure, red: not" if task == "asr" else ""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(text)}</title><style>{STYLE}</style>
<h1>{html.escape(text)}</h1><p class="about">{html.escape(about)}</p>
{"".join(player(name, wav) for name, wav in wavs.items())}
<h2>Text tokens{coloured}</h2><p class="words">{shown}</p>
<h2>Over time</h2>
<div class="wide"><img src="{image}" alt="spectrogram, probabilities, entropies, attention"></div>
<h2>Speech tokens, a column a frame</h2>
<div class="wide"><table>{"".join(rows)}</table></div></html>
"""


def how_it_ended(ended):
    return "ended by itself" if ended else "cut at its limit"


def explain_tts(speaker, text, prompt, generator, head=None):
    """Speak a text, in a voice prompt [codes (T, N)] or None, and show what went on -> (HTML, wav)."""
    [(codes, ended)] = speaker.synthesise([text], [prompt], generator)
    if len(codes) < 3:
        raise ValueError("the model ended at once: there is nothing to look at; try another --seed")
    c, wav = speaker.config, speaker.decode(codes)
    task, entries = speaker.tts_entries(text, prompt)
    entries["speech"] = speech_frames(speaker.vocab, codes)
    about = f"{speaker.run}: {len(codes)} frames, {len(wav) / SAMPLE_RATE:.2f} s, {how_it_ended(ended)}"
    wavs = {"spoken by the model": wav}
    if prompt is not None:
        wavs["voice prompt"] = speaker.decode(prompt[:c.prompt_len])
    return page(speaker, task, text, wavs, entries, about, head), wav


def explain_asr(speaker, wav, head=None):
    """Read a recording and show what went on -> (HTML, text)."""
    codes = speaker.encode(wav)
    [(text, ended)] = speaker.recognise([codes])
    if not text.strip():
        raise ValueError("the model heard nothing: there is nothing to look at")
    speech = speech_frames(speaker.vocab, codes, speaker.config.semantic_asr)
    about = f"{speaker.run}: {len(wav) / SAMPLE_RATE:.2f} s, {len(speech)} speech frames"
    if speaker.config.semantic_asr:
        about += f" of {len(codes)}: repeated tokens are left out, and the picture's time is a little off"
    about += f"; the text {how_it_ended(ended)}"
    entries = {"speech": speech, "text": speaker.ids(text)}
    return page(speaker, "asr", text, {"what it heard": wav}, entries, about, head), text


def explain(speaker, args, generator):
    """Write the page args.explain about the one utterance that sample.py's arguments name."""
    head = tuple(int(part) for part in args.head.split(",")) if args.head else None
    if args.task == "tts":
        prompt = speaker.encode(load_audio(args.prompt)) if args.prompt else None
        made, wav = explain_tts(speaker, " ".join(args.input), prompt, generator, head)
        save_audio(args.out, wav)
    elif args.task == "asr" and len(args.input) == 1:
        made, text = explain_asr(speaker, load_audio(args.input[0]), head)
        print(text)
    else:
        raise ValueError("--explain goes with asr of one file, or tts of one text")
    os.makedirs(os.path.dirname(args.explain) or ".", exist_ok=True)
    with open(args.explain, "w", encoding="utf-8") as f:
        f.write(made)
    print(f"{args.explain}: open it in a browser")
