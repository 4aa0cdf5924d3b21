"""Fit: the clusters and code books that make tokens of a pretrained network's features.

Helper of pretrained.py; its commands are there:  python tokenize_audio.py fit-semantic|fit-acoustic ...
"""
import argparse
import hashlib
import json
import os
import shutil
from itertools import islice

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from corpora import Manifest
from pretrained import FRAME_HZ, LYRA_FILES, VERSION, Lyra, NeuralCodec, SpeechEncoder
from shards import checksum, write_file
from tokenize_audio import SAMPLE_RATE, kmeans, load_audio, nearest

TOGETHER = 16           # files whose features are made at once, which a GPU likes
LONGEST_S = 600         # seconds: what is longer is not fitted on


def spread_start(x, n_cluster, generator):
    """k-means++: points far from those already chosen are likelier, x (M, C) -> (n_cluster, C)."""
    chosen = torch.randint(len(x), (1,), generator=generator).to(x.device)
    far = (x - x[chosen]).pow(2).sum(1)
    for _ in range(n_cluster - 1):
        luck = torch.rand(1, generator=generator).to(x.device)
        new = torch.searchsorted(far.cumsum(0), far.sum() * luck)
        new = new.clamp_max(len(x) - 1)
        chosen = torch.cat([chosen, new])
        far = torch.minimum(far, (x - x[new]).pow(2).sum(1))
    return x[chosen]


def spread(x, piece=50_000):
    """Mean and standard deviation (C,) of x (M, C), a memory map, which never is in memory as a whole."""
    total, square = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for start in range(0, len(x), piece):
        part = x[start:start + piece].astype(np.float64)
        total, square = total + part.sum(0), square + (part ** 2).sum(0)
    mean = total / len(x)
    std = np.sqrt(np.maximum(square / len(x) - mean ** 2, 1e-8))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def fit_clusters(x, n_cluster, path, n_step=300, batch=20_000, seed=0, say=print, mean=0.0, std=1.0,
                 device="cpu"):
    """Mini-batch k-means of (x - mean) / std, x (M, C) perhaps a memory map -> centroids (n_cluster, C).

    Each step moves the centroids towards the means of a batch, the less the more they have seen (Sculley
    2010). `path` keeps the state: a run that was cut off goes on from there.
    """
    if len(x) < 2 * n_cluster:
        raise ValueError(f"{len(x)} frames are too few for {n_cluster} clusters: use more audio")
    rng, first = np.random.default_rng(seed), 0

    def points_at(rows):
        return ((torch.from_numpy(np.array(x[rows], dtype=np.float32)) - mean) / std).to(device)

    def pick(n):
        return points_at(np.sort(rng.choice(len(x), min(n, len(x)), False)))

    if os.path.exists(path):
        state = load_file(path)
        first = int(state["step"][0])
        centroids, count = (torch.from_numpy(state[name]).to(device) for name in ("centroids", "count"))
        say(f"k-means goes on after step {first}")
    else:
        generator = torch.Generator().manual_seed(seed)
        centroids = spread_start(pick(20 * n_cluster), n_cluster, generator)
        count = torch.zeros(n_cluster, device=device)
    for step in range(first, n_step):
        rng = np.random.default_rng((seed, step + 1))       # a step does not depend on those before
        points = pick(batch)
        label = nearest(points, centroids)                                  # (batch,)
        new = torch.bincount(label, minlength=n_cluster).float()
        total = torch.zeros_like(centroids).index_add_(0, label, points)
        count += new
        rate = torch.where(new > 0, new / count.clamp_min(1), 0)[:, None]
        centroids += rate * (total / new.clamp_min(1)[:, None] - centroids)
        lost = ((count < 0.1 * count.mean()) if step % 50 == 49 and step < n_step // 2
                else torch.zeros_like(count, dtype=torch.bool)).nonzero()[:, 0]
        centroids[lost] = points[:len(lost)]                # clusters that nothing falls into start anew
        count[lost] = count.mean()
        if step % 50 == 49 or step == n_step - 1:
            inertia = float((points - centroids[nearest(points, centroids)]).pow(2).sum(1).mean())
            say(f"step {step + 1}: mean squared distance {inertia:.4g} in its {len(points):,} frames")
            state = {"centroids": centroids.cpu().numpy(), "count": count.cpu().numpy(),
                     "step": np.array([step + 1])}
            save_file(state, path + ".tmp")
            os.replace(path + ".tmp", path)
    used, distance = torch.zeros(n_cluster, dtype=torch.long), 0.0
    for start in range(0, len(x), batch):
        points = points_at(slice(start, start + batch))
        label = nearest(points, centroids)
        used += torch.bincount(label, minlength=n_cluster).cpu()
        distance += float((points - centroids[label]).pow(2).sum())
    share = used[used > 0] / len(x)
    say(f"all {len(x):,} frames: mean squared distance {distance / len(x):.4g}; {len(share)} of {n_cluster} "
        f"clusters used, as evenly as {float((-share * share.log()).sum().exp()):.0f} equal ones")
    return centroids.cpu()


def fit_books(x, n_level, n_code, seed=0, say=print):
    """Code books (n_level, n_code, C), each fitted on what those before leave of x (M, C)."""
    generator, books = torch.Generator().manual_seed(seed), []
    energy = (x - x.mean(0)).pow(2).sum(1).mean()
    for level in range(n_level):
        books.append(kmeans(x, n_code, generator))
        x = x - books[-1][nearest(x, books[-1])]
        say(f"level {level + 1}: {100 * float(x.pow(2).sum(1).mean() / energy):.1f} % of the energy is left")
    return torch.stack(books)


def collect(folder, paths, features_all, n_frame, say=print):
    """Features of audio files [(path, speed)], until there are n_frame rows -> memory map (M, C) of float16.
    features_all: [wav (n,)] -> [(T, C)].

    They are kept in `folder` as they come; what is there already is not made again.
    """
    if paths is None:
        raise ValueError("fitted on what? name a manifest after the folder")
    data, progress = f"{folder}/features.bin", f"{folder}/features.json"
    state = {"files": 0, "rows": 0, "width": 0}
    if os.path.exists(progress):
        with open(progress) as f:
            state = json.load(f)
        say(f"{state['rows']:,} frames are there already")
    with open(data, "r+b" if os.path.exists(data) else "wb") as f:
        f.truncate(state["rows"] * state["width"] * 2)
        f.seek(0, os.SEEK_END)
        paths = iter(tqdm(paths, "features", mininterval=2, unit="file"))
        some = list(islice(paths, state["files"], state["files"] + TOGETHER))
        while some and state["rows"] < n_frame:
            wavs = []
            for path, speed in some:
                try:
                    wavs.append(load_audio(path, speed, LONGEST_S))
                except ValueError as problem:
                    say(f"left out: {problem}")
            for x in features_all(wavs):
                f.write(x.cpu().numpy().astype(np.float16).tobytes())              # (T, C)
                state |= {"rows": state["rows"] + len(x), "width": x.shape[1]}
            state["files"] += len(some)
            f.flush()
            write_file(progress, json.dumps(state))
            some = list(islice(paths, TOGETHER))
    if not state["rows"]:
        raise ValueError("no audio of the manifest could be read")
    return np.memmap(data, np.float16, "r", shape=(state["rows"], state["width"]))


def add_part(folder, part, about, arrays):
    """Write one half of a tokenizer into its folder, beside the other half if that is there."""
    path, books = f"{folder}/audio_tokenizer.json", f"{folder}/codebooks.safetensors"
    whole, tensors = {"kind": "pretrained", "version": VERSION}, {}
    if os.path.exists(path):
        with open(path) as f:
            whole = json.load(f)
        own = ("clusters", "mean", "std") if part == "semantic" else ("books",)
        tensors = {name: array for name, array in load_file(books).items() if name not in own}
    tensors |= {name: array.contiguous().numpy() for name, array in arrays.items()}
    save_file(tensors, books + ".tmp")
    os.replace(books + ".tmp", books)
    write_file(path, json.dumps(whole | {part: about}, indent=1))


def read_kmeans(path, encoder):
    """The centroids (K, C) of scikit-learn's KMeans in a joblib file, if they fit the encoder."""
    try:
        import joblib
        centroids = torch.from_numpy(np.asarray(joblib.load(path).cluster_centers_, dtype=np.float32))
    except (ImportError, OSError, AttributeError) as problem:
        raise ValueError(f"{path} is no k-means that we can read ({problem}); it needs joblib and "
                         "scikit-learn") from None
    width = encoder.features(np.zeros(SAMPLE_RATE, np.float32)).shape[1]
    if centroids.shape[1] != width:
        raise ValueError(f"{path} has centroids of {centroids.shape[1]} numbers, the encoder's have {width}")
    return centroids


def main(arguments):
    parser = argparse.ArgumentParser(prog="tokenize_audio.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fit-semantic", "fit-acoustic"])
    parser.add_argument("folder", help="of the tokenizer")
    parser.add_argument("manifest", nargs="?", help="whose training utterances it is fitted on: corpora.py; "
                        "not for --kmeans and codecs with codes of their own")
    parser.add_argument("--encoder", help="fit-semantic: a speech encoder's folder or hub id")
    parser.add_argument("--layer", type=int, default=-1, help="fit-semantic: of its hidden states")
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--kmeans", help="fit-semantic: a k-means of scikit-learn that is there already, as "
                        "written by joblib, which unpickles it: only from people you trust")
    parser.add_argument("--codec", help="fit-acoustic: a codec's folder or hub id")
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--codes", type=int, default=1024, help="fit-acoustic, Lyra: codes of a level")
    parser.add_argument("--own", action="store_true", help="fit-acoustic, Lyra: its own quantisers, up to 46 "
                        "levels of 16 codes, instead of fitted ones; no manifest")
    parser.add_argument("--frame_hz", type=float, default=FRAME_HZ, help="fit-acoustic: a codec's own rate")
    parser.add_argument("--frames", type=int, default=2_000_000, help="fit on at most so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if max(args.clusters, args.codes) > 2 ** 15:
        raise ValueError("shards hold codes in 16 bits: 32,768 clusters, or codes of a level, are the most")
    paths = None
    if args.manifest:
        manifest = Manifest(args.manifest)
        order = np.random.default_rng(args.seed).permutation(manifest.numbers("train"))
        paths = ((row["audio"], row["speed"]) for row in manifest.rows(order) if row["audio"])
    # features of what and from what: only the same goes on from there. The folder can be deleted afterwards
    said = {name: str(getattr(args, name)) for name in ("encoder", "layer", "codec", "frames", "seed")}
    said["manifest"] = args.manifest and checksum(args.manifest)
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
    work = f"{args.folder}/{args.what}-{digest}"
    os.makedirs(work, exist_ok=True)
    if args.what == "fit-semantic":
        if not args.encoder:
            raise ValueError("which encoder? --encoder=FOLDER or hub id")
        encoder = SpeechEncoder(args.encoder, args.layer, args.device)
        if args.kmeans:
            arrays = {"clusters": read_kmeans(args.kmeans, encoder)}
        else:
            x = collect(work, paths, encoder.features_all, args.frames)
            mean, std = spread(x)       # a few loud dimensions would else decide, and they are not phones
            clusters = fit_clusters(x, args.clusters, f"{work}/{args.clusters}.safetensors", seed=args.seed,
                                    mean=mean, std=std, device=args.device)
            arrays = {"clusters": clusters, "mean": mean, "std": std}
        where = os.path.abspath(args.encoder) if os.path.exists(args.encoder) else args.encoder
        add_part(args.folder, "semantic", {"encoder": where, "layer": args.layer}, arrays)
    else:
        if not args.codec:
            raise ValueError("which codec? --codec=FOLDER or hub id")
        where = os.path.abspath(args.codec) if os.path.exists(args.codec) else args.codec
        if os.path.exists(f"{args.codec}/soundstream_encoder.tflite"):
            for name in LYRA_FILES:         # small enough that the tokenizer takes them along
                shutil.copy(f"{args.codec}/{name}", f"{args.folder}/{name}")
            where, lyra = ".", Lyra(args.codec)
            if args.own:
                books = lyra.own[:args.levels]
            else:
                x = collect(work, paths, lambda wavs: map(lyra.features, wavs), args.frames)
                x = torch.from_numpy(np.array(x, dtype=np.float32))
                books = fit_books(x, args.levels, args.codes, args.seed)
            arrays, (levels, codes) = {"books": books}, books.shape[:2]
            if levels < args.levels:
                raise ValueError(f"{args.codec} has {levels} levels of its own, {args.levels} are wanted")
        else:
            arrays, levels = {}, args.levels
            codes = NeuralCodec(args.codec, levels, args.device, args.frame_hz).n_code
        about = {"codec": where, "levels": levels, "codes": codes}
        if args.frame_hz != FRAME_HZ:
            about["frame_hz"] = args.frame_hz
        add_part(args.folder, "acoustic", about, arrays)
    print(f"{args.folder}: {args.what} is done")
