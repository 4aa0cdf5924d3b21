"""Audio to tokens and back: wav -> (T, N) codes at 50 Hz -> wav.

Fifth file of the reading order. The tokenizer below is fitted on a corpus in
seconds, without pretrained weights, and has the two kinds of tokens of OpusLM (arXiv 2506.17611, section 2):
  semantic   what is said: k-means clusters of features from which the speaker has been removed
  acoustic   how it sounds: residual vector quantisation of the log-mel spectrum, 8 levels, coarse to fine
Hear what the tokens keep:  python tokenize_audio.py out/numbers/audio_tokenizer in.wav out.wav
For real speech, pretrained tokenizers do better by far: pretrained.py.
"""
import json
import os
import sys

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from script import run_script

SAMPLE_RATE, HOP, WINDOW, N_MEL = 16000, 320, 1024, 80     # a hop of 20 ms: 50 frames a second
MEL_FLOOR = 0.02        # added before the log; 1e-4 codes inaudible detail and triples the WER after decoding
CONTEXT = 3             # semantic features see 3 frames to each side
NORM_FRAMES = 30        # an utterance's mean and spread count against this many frames of the corpus average
SEMANTIC_DIM = 24
VERSION = 1


def load_audio(path, speed=1.0, longest=None):
    """Audio file of any rate and channels, played `speed` times as fast -> mono float32 (n,) at 16 kHz.
    ValueError says what is wrong; of what has more than `longest` seconds it says so, and reads no more."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as f:
            sr = f.samplerate
            most = -1 if longest is None else int((longest * speed + 1) * sr)
            wav = f.read(most, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:             # TypeError: a name that ends in .raw
        raise ValueError(f"{path}: not readable as audio ({error})") from None
    if longest is not None and len(wav) > longest * speed * sr:
        raise ValueError(f"{path}: longer than {longest:g} s")
    return to_mono_16k(wav, sr * speed, path)


def save_audio(path, wav):
    """Write wav (n,) at 16 kHz in the format that the path ends in. ValueError says why it can't be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        soundfile.write(path, wav, SAMPLE_RATE)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise ValueError(f"{path}: can't be written as audio ({error})") from None


def to_mono_16k(wav, sr, name="audio"):
    """wav (n,) or (n, channels) at sr Hz -> (m,) float32 at 16 kHz. ValueError if too short or non-finite."""
    wav = np.asarray(wav, dtype=np.float32)
    wav = wav.mean(1) if wav.ndim == 2 else wav
    if len(wav) < sr * WINDOW / SAMPLE_RATE:
        raise ValueError(f"{name}: {len(wav)} samples at {sr:g} Hz, "
                         f"we need at least {WINDOW / SAMPLE_RATE * 1000:.0f} ms")
    if not np.isfinite(wav).all():
        raise ValueError(f"{name}: has samples that are not finite numbers")
    return wav if sr == SAMPLE_RATE else soxr.resample(wav, sr, SAMPLE_RATE)


def cut_wav(wav, seconds):
    """Long speech (n,) at 16 kHz -> pieces of at most so many seconds, cut where it is quietest in the last
    third of each."""
    pieces, size, step = [], int(seconds * SAMPLE_RATE), SAMPLE_RATE // 10
    while len(wav) > size:
        places = range(size * 2 // 3, size - 2 * step + 1, step // 2)       # and 0.1 s is left at least
        cut = min(places, key=lambda k: float(np.square(wav[k:k + step]).mean())) + step // 2
        pieces.append(wav[:cut])
        wav = wav[cut:]
    return [*pieces, wav]


# ---- features ----------------------------------------------------------------------------------------------

def mel_filters():
    """(N_MEL, WINDOW/2+1) triangles, evenly spaced on the mel scale from 0 to 8 kHz, each summing to 1."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), N_MEL + 2)
    hz = 700 * (10 ** (mel / 2595) - 1)                                     # (N_MEL + 2,) corners
    bins = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    rise = (bins - hz[:-2, None]) / (hz[1:-1] - hz[:-2])[:, None]
    fall = (hz[2:, None] - bins) / (hz[2:] - hz[1:-1])[:, None]
    triangles = np.maximum(0, np.minimum(rise, fall)) + 1e-8
    return (triangles / triangles.sum(1, keepdims=True)).astype(np.float32)


MEL = torch.from_numpy(mel_filters())
HANN = torch.hann_window(WINDOW)


def stft(wav):
    """wav (n,) -> complex (T, WINDOW/2+1) with T = ceil(n / HOP); frame t is centred on its own 20 ms."""
    T = -(-wav.shape[-1] // HOP)
    left = (WINDOW - HOP) // 2
    padded = F.pad(wav, (left, T * HOP - wav.shape[-1] + WINDOW - HOP - left))
    return torch.fft.rfft(padded.unfold(-1, WINDOW, HOP) * HANN)            # (T, bins)


def istft(spectrum):
    """The least-squares inverse of `stft`: complex (T, bins) -> wav (T * HOP,)."""
    T = spectrum.shape[0]
    frames = torch.fft.irfft(spectrum, n=WINDOW) * HANN                     # (T, WINDOW)
    fold = dict(output_size=(1, (T - 1) * HOP + WINDOW), kernel_size=(1, WINDOW), stride=(1, HOP))
    wav = F.fold(frames.T[None], **fold).flatten()
    power = F.fold((HANN ** 2)[:, None].expand(-1, T)[None], **fold).flatten()
    left = (WINDOW - HOP) // 2
    return (wav / power.clamp_min(1e-4))[left:left + T * HOP]


def log_mel(wav):
    """wav (n,) float32 numpy at 16 kHz -> (T, N_MEL) floored log-mel magnitudes, T = ceil(n / HOP)."""
    return torch.log(stft(torch.from_numpy(wav)).abs() @ MEL.T + MEL_FLOOR)


def cepstra(mel):
    """Log-mel (T, N_MEL) -> (T, 20): first coefficients of its cosine transform, the spectrum's envelope."""
    angle = np.pi / N_MEL * (np.arange(N_MEL) + 0.5)[:, None] * np.arange(20)
    return mel @ torch.from_numpy(np.cos(angle) * (2 / N_MEL) ** 0.5).float()


def contextual(mel, mean, std):
    """Speaker-normalised cepstra with their neighbours: (T, N_MEL) -> (T, (2 CONTEXT + 1) * 20).

    Normalising by the utterance removes most of the voice and the channel. Short utterances have a poor
    estimate of their own mean and std (20,), so we mix in the corpus's as if it were NORM_FRAMES more frames.
    """
    x = cepstra(mel)
    share = len(x) / (len(x) + NORM_FRAMES)
    own = share * x.mean(0) + (1 - share) * mean
    spread = (share * (x - own).pow(2).mean(0) + (1 - share) * std ** 2).sqrt()
    x = F.pad(((x - own) / spread).T[None], (CONTEXT, CONTEXT), mode="replicate")[0]    # (20, T + 2 CONTEXT)
    return x.unfold(1, 2 * CONTEXT + 1, 1).permute(1, 2, 0).flatten(1)                  # (T, 7 * 20)


# ---- fitting -----------------------------------------------------------------------------------------------

def distances(x, centroids):
    """Squared distances (T, K) of x (T, C) to centroids (K, C), less |x|^2, which is the same for every k."""
    return torch.addmm(centroids.pow(2).sum(1), x, centroids.T, alpha=-2)


def nearest(x, centroids):
    """The row number of the nearest centroid: x (T, C) -> (T,). In pieces that stay in a CPU's cache."""
    size = 1024 if x.device.type == "cpu" else 16384
    return torch.cat([distances(piece, centroids).argmin(1) for piece in x.split(size)])


def quantise(x, books, beam=1):
    """Residual vector quantisation: x (T, C), books (levels, K, C) -> codes (T, levels). beam: so many of the
    best beginnings are kept at each level, as the nearest code now may leave what later levels lack."""
    (T, C), K = x.shape, books.shape[1]
    codes, rest, frame = torch.zeros(T, 1, 0, dtype=torch.long), x[:, None], torch.arange(T)[:, None]
    for book in books:
        if beam == 1:
            code = nearest(rest[:, 0], book)[:, None]                                       # (T, 1)
            begun = torch.zeros_like(code)
        else:
            cost = distances(rest.reshape(-1, C), book).view(T, -1, K) + rest.pow(2).sum(2, keepdim=True)
            best = cost.flatten(1).topk(min(beam, cost[0].numel()), largest=False).indices  # (T, beam)
            begun, code = best // K, best % K
        codes = torch.cat([codes[frame, begun], code[..., None]], 2)                # (T, beam, levels so far)
        rest = rest[frame, begun] - book[code]                                              # (T, beam, C)
    return codes[:, 0]


def kmeans(x, n_cluster, generator, n_iter=12):
    """x (M, C) -> centroids (K, C) by Lloyd's algorithm; a cluster that dies restarts at a random point."""
    if len(x) < n_cluster:
        raise ValueError(f"{len(x)} frames can't make {n_cluster} clusters: "
                         "use more audio or a smaller codebook")
    centroids = x[torch.randperm(len(x), generator=generator)[:n_cluster]].clone()
    for _ in range(n_iter):
        label = nearest(x, centroids)                                       # (M,)
        count = torch.bincount(label, minlength=n_cluster)[:, None]
        centroids = torch.zeros_like(centroids).index_add_(0, label, x) / count.clamp_min(1)
        dead = (count[:, 0] == 0).nonzero()[:, 0]
        centroids[dead] = x[torch.randint(len(x), (len(dead),), generator=generator)]
    return centroids


def align(a, b):
    """Dynamic time warping of (T, C) and (U, C) -> matching row numbers (L,), (L,)."""
    cost = torch.cdist(a, b).numpy()
    T, U = cost.shape
    total = np.full((T + 1, U + 1), np.inf)
    total[0, 0] = 0
    for i in range(T):      # the step within a row needs a scan; the two steps from the row above do not
        above, row, now = np.minimum(total[i, :-1], total[i, 1:]), cost[i], total[i + 1]
        for j in range(U):
            now[j + 1] = row[j] + min(above[j], now[j])
    i, j, path = T, U, []
    while i > 0 and j > 0:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda ij: total[ij])
    left, right = np.array(path[::-1]).T
    return torch.from_numpy(left.copy()), torch.from_numpy(right.copy())


def discriminant(x, nuisance, n_dim):
    """Linear discriminant analysis without labels: directions where speech varies much and speakers little.

    x (M, C): features.  nuisance (L, C): differences of aligned frames of the same words by two speakers,
    whose covariance stands for the within-class one. Returns (C, n_dim), scaled to unit nuisance spread.
    """
    within = torch.cov(nuisance.T) / 2 + 1e-3 * torch.eye(x.shape[1])
    low = torch.linalg.inv(torch.linalg.cholesky(within))                   # whitens the nuisance
    values, vectors = torch.linalg.eigh(low @ torch.cov(x.T) @ low.T)
    return low.T @ vectors[:, -n_dim:].flip(1)


def same_text_pairs(texts, speakers, limit, rng):
    """Pairs (i, j) of utterances with equal text and different speakers, in random order, at most `limit`."""
    by_text = {}
    for i in rng.permutation(len(texts)):
        if texts[i]:                            # speech without a transcript is not all of one text
            by_text.setdefault(texts[i], []).append(int(i))
    pairs = [(group[k], group[k + 1]) for group in by_text.values() for k in range(0, len(group) - 1, 2)
             if speakers[group[k]] != speakers[group[k + 1]]]
    return [pairs[k] for k in rng.permutation(len(pairs))[:limit]]


def fit_tokenizer(wavs, texts, speakers, n_semantic=256, n_acoustic=256, n_level=8, switch_penalty=60.0,
                  seed=0, say=print):
    """Fit the built-in tokenizer on utterances of a corpus. wavs: list of (n,) at 16 kHz -> Tokenizer."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    mels = [log_mel(wav) for wav in wavs]
    mel = torch.cat(mels)                                                   # (M, N_MEL)
    std, mean = torch.std_mean(cepstra(mel), 0)
    features = [contextual(m, mean, std) for m in mels]
    x = torch.cat(features)                                                 # (M, C)
    pairs = same_text_pairs(texts, speakers, 150, rng)
    if len(pairs) >= 20:
        matches = [(features[i][a], features[j][b]) for i, j in pairs
                   for a, b in [align(features[i], features[j])]]
        projection = discriminant(x, torch.cat([a - b for a, b in matches]), SEMANTIC_DIM)
        say(f"semantic features: discriminant analysis on {len(pairs)} pairs of one text by two speakers")
    else:
        values, vectors = torch.linalg.eigh(torch.cov(x.T))
        projection = (vectors * values.clamp_min(1e-6).rsqrt())[:, -SEMANTIC_DIM:].flip(1)
        say(f"semantic features: principal components (only {len(pairs)} texts are spoken by two speakers, "
            "20 needed)")
    projected = x @ projection
    semantic = kmeans(projected, n_semantic, generator)
    residual, levels = mel, []
    for _ in range(n_level):
        levels.append(kmeans(residual, n_acoustic, generator))
        residual = residual - levels[-1][nearest(residual, levels[-1])]
    arrays = dict(mean=mean, std=std, projection=projection, semantic=semantic, acoustic=torch.stack(levels))
    return Tokenizer(arrays, switch_penalty)


# ---- the tokenizer -----------------------------------------------------------------------------------------

class Tokenizer:
    """What all tokenizers have: encode, encode_all, decode, start_decoding, save, load and the sizes."""
    sample_rate, frame_hz = SAMPLE_RATE, SAMPLE_RATE / HOP

    def __init__(self, arrays, switch_penalty):
        """arrays: mean and std (20,), projection (C, 24), semantic (K, 24), acoustic (levels, K, N_MEL)."""
        self.arrays = {name: array.contiguous() for name, array in arrays.items()}
        self.switch_penalty = switch_penalty
        self.n_semantic = len(arrays["semantic"])
        self.n_level, self.n_acoustic = arrays["acoustic"].shape[:2]

    def encode(self, wav, sr=SAMPLE_RATE):
        """wav (n,) or (n, channels) at sr Hz -> codes (T, N) int16, semantic ones first; T = ceil(n/HOP)."""
        mel = log_mel(to_mono_16k(wav, sr))
        a = self.arrays
        cost = distances(contextual(mel, a["mean"], a["std"]) @ a["projection"], a["semantic"])
        semantic = smooth_path(cost.numpy(), self.switch_penalty)           # (T,)
        acoustic = quantise(mel, a["acoustic"]).numpy()                     # (T, levels)
        return np.concatenate([semantic[:, None], acoustic], 1).astype(np.int16)            # (T, N)

    def encode_all(self, wavs):
        """[(n,)] at 16 kHz -> [(T, N)]: a tokenizer may have a faster way for many at once."""
        return [self.encode(wav) for wav in wavs]

    def decode(self, codes, n_iter=32):
        """codes (T, N) -> wav (T * HOP,) float32 at 16 kHz. Semantic codes are skipped: they do not sound."""
        codes = torch.as_tensor(np.asarray(codes), dtype=torch.long)
        if len(codes) == 0:
            return np.zeros(0, np.float32)
        levels = self.arrays["acoustic"]
        mel = sum(levels[k][codes[:, k - self.n_level]] for k in range(self.n_level))
        return griffin_lim(mel, n_iter)

    def start_decoding(self):
        """A function that decodes piece by piece without a seam, for a tokenizer that can: see pretrained.py.
        Griffin-Lim's phases need what comes after."""
        return None

    def save(self, folder, whole=True):
        """whole: of a pretrained tokenizer, with its networks; ours has none."""
        os.makedirs(folder, exist_ok=True)
        arrays = {name: array.numpy() for name, array in self.arrays.items()}
        save_file(arrays, f"{folder}/codebooks.safetensors")
        with open(f"{folder}/audio_tokenizer.json", "w") as f:
            json.dump({"kind": "builtin", "version": VERSION, "switch_penalty": self.switch_penalty}, f)

    @classmethod
    def load(cls, folder, device="cpu"):
        """device: where a pretrained tokenizer's networks run."""
        if not os.path.exists(f"{folder}/audio_tokenizer.json"):
            raise ValueError(f"{folder} holds no audio tokenizer: run prepare.py first")
        with open(f"{folder}/audio_tokenizer.json") as f:
            meta = json.load(f)
        if meta["kind"] == "pretrained":
            from pretrained import PretrainedTokenizer
            return PretrainedTokenizer.load(folder, meta, device)
        if meta["version"] != VERSION:
            raise ValueError(f"{folder}: tokenizer version {meta['version']}, we read {VERSION}: "
                             "run prepare.py again")
        arrays = load_file(f"{folder}/codebooks.safetensors")
        return cls({name: torch.from_numpy(array) for name, array in arrays.items()}, meta["switch_penalty"])


def smooth_path(cost, penalty):
    """The cheapest sequence of clusters when every change costs `penalty`: cost (T, K) -> labels (T,).

    Viterbi's algorithm with one transition cost. Plain nearest-cluster labels flicker at 80 % of the frames,
    which a language model can only learn as noise; with a penalty they change about as often as sounds do.
    """
    T, K = cost.shape
    total, stay, best = cost[0], np.empty((T, K), bool), np.empty(T, np.int64)
    for t in range(1, T):
        best[t] = total.argmin()
        jump = total[best[t]] + penalty
        stay[t] = total <= jump
        total = np.minimum(total, jump) + cost[t]
    labels = np.empty(T, np.int64)
    labels[-1] = total.argmin()
    for t in range(T - 1, 0, -1):
        labels[t - 1] = labels[t] if stay[t, labels[t]] else best[t]
    return labels


def griffin_lim(mel, n_iter):
    """Floored log-mel (T, N_MEL) -> wav (T * HOP,), phases by alternating projections (fast Griffin-Lim)."""
    target = (mel.exp() - MEL_FLOOR).clamp_min(1e-5)                        # (T, N_MEL) magnitudes
    linear = (target @ torch.linalg.pinv(MEL).T).clamp_min(1e-6)            # (T, bins)
    for _ in range(8):      # multiplicative updates keep it positive while it comes to match the magnitudes
        linear = linear * ((target @ MEL) / (linear @ MEL.T @ MEL).clamp_min(1e-8))
    phase = torch.rand(linear.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    spectrum, previous = torch.polar(linear, phase), torch.zeros_like(linear, dtype=torch.complex64)
    for _ in range(n_iter):
        projected = stft(istft(spectrum))
        moved = projected + 0.9 * (projected - previous)                    # momentum, Perraudin et al. 2013
        spectrum, previous = linear * moved / moved.abs().clamp_min(1e-9), projected
    wav = istft(spectrum).numpy()
    return wav / max(1.0, np.abs(wav).max())


def main(arguments):
    if arguments and arguments[0].startswith("fit-"):
        import fit
        return fit.main(arguments)
    if len(arguments) != 3:
        sys.exit(__doc__)
    tokenizer = Tokenizer.load(arguments[0])
    spoken = tokenizer.encode(load_audio(arguments[1]))
    save_audio(arguments[2], tokenizer.decode(spoken))
    print(f"{len(spoken)} frames; the first five:\n{spoken[:5]}")
    return None


if __name__ == "__main__":
    run_script(main)
