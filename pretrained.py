"""Pretrained tokenizers: a speech encoder with k-means for what is said, a neural codec for how it sounds.

Helper of tokenize_audio.py in the reading order; pip install -e '.[codecs]'. A tokenizer is a folder, made in
two steps, which prepare.py and train.py then take as --audio_tokenizer=FOLDER:
  python tokenize_audio.py fit-semantic FOLDER manifest.tsv --encoder=openai/whisper-base --clusters=1000
  python tokenize_audio.py fit-acoustic FOLDER manifest.tsv --codec=models/lyra
Encoder: a folder or hub id of Whisper, HuBERT, WavLM or wav2vec 2.0.  Codec: a folder with Lyra v2's
SoundStream (tflite files; fitted books take the place of its own 46 x 16, which --own keeps), or DAC,
X-codec, EnCodec, Mimi in Hugging Face's form, whose own codes are taken. Encoders make 50 frames a second,
and so should codecs: DAC at 16 kHz and X-codec do. One of another rate, as EnCodec at 24 kHz (75) or Mimi
(12.5), is taken by --frame_hz=75; semantic tokens are then said again, or left out, to keep time with it.

OpusLM's own tokens, of XEUS and ESPnet's DAC, come through the espnet package, from files that are downloaded
before, with config.yaml beside them (not run: we do not have them; espnet unpickles, so trust them first):
  fit-semantic FOLDER --encoder=xeus/model/xeus_checkpoint_new.pth --layer=18 \
      --kmeans=xeus/model/km_opus_lm.mdl
  fit-acoustic FOLDER --codec=codec/360epoch.pth
"""
import importlib
import json
import os
import shutil

import numpy as np
import soxr
import torch
from safetensors.numpy import load_file, save_file

from tokenize_audio import HOP, SAMPLE_RATE, nearest, quantise, to_mono_16k
from tokenize_text import find_folder

VERSION = 1
WEIGHTS = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
LYRA_FILES = ("soundstream_encoder.tflite", "lyragan.tflite", "codebooks.npy")
WINDOW_S, CONTEXT_S = 30.0, 2.0     # long audio goes in windows; frames so near a cut come from the next one
BATCH_S = 480               # seconds of audio in a batch, on a GPU; on a CPU one utterance after the other
FRAME_HZ = SAMPLE_RATE / HOP
BEAM = 4                    # of Lyra's quantisation: a tenth less of the energy is lost (docs/data.md)


# ---- speech encoders ---------------------------------------------------------------------------------------

def windows(n, size, context):
    """Cut n frames into windows of at most `size` -> [(first, end, first kept, end kept)].

        |--------keep--------|ctx|                     what is kept has context on both sides, but at the
                         |ctx|--------keep------|      ends of the audio
    """
    if n <= size:
        return [(0, n, 0, n)]
    result, kept = [], 0
    while kept < n:
        first = max(0, min(kept - context, n - size))
        end = min(n, first + size)
        end_kept = n if end == n else end - context
        result.append((first, end, kept, end_kept))
        kept = end_kept
    return result


def espnet_model(task, path, device):
    """A model of the espnet package: task is ssl or gan_codec, path its .pth file."""
    try:
        tasks = importlib.import_module(f"espnet2.tasks.{task}")
    except ImportError:
        raise ValueError(f"{path} needs ESPnet: pip install espnet") from None
    if not os.path.isfile(path) or not os.path.isfile(f"{os.path.dirname(path)}/config.yaml"):
        raise ValueError(f"{path}: no such file, or no config.yaml beside it")
    build = {"ssl": "SSLTask", "gan_codec": "GANCodecTask"}[task]
    return getattr(tasks, build).build_model_from_file(None, path, device)[0].eval().requires_grad_(False)


class SpeechEncoder:
    """A layer of a pretrained speech encoder: wav (n,) at 16 kHz -> (T, C) at 50 Hz, T = ceil(n / HOP)."""

    def __init__(self, name, layer=-1, device="cpu"):
        """layer: of hidden_states, 0 being the input of the first one; -1 is the last. Of XEUS (a .pth file)
        it is a block's output, 0 being the first one's, as OpusLM counts."""
        self.layer, self.device, self.batch_s = layer, device, 0 if device == "cpu" else BATCH_S
        if name.endswith(".pth"):
            self.model, self.kind = espnet_model("ssl", name, device), "xeus"
            self.normalise, self.can_mask = False, True
            return
        from transformers import AutoConfig, AutoModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
        folder = find_folder(name, WEIGHTS)
        config = AutoConfig.from_pretrained(folder)
        self.kind = config.model_type
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        if self.kind == "whisper":
            self.model, hop = model.encoder, 2 * 160
            self.prepare = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
            depth = config.encoder_layers
        elif hasattr(config, "conv_stride"):
            self.model, hop = model, int(np.prod(config.conv_stride))
            about, depth = f"{folder}/preprocessor_config.json", config.num_hidden_layers
            self.normalise = not os.path.exists(about) or (
                Wav2Vec2FeatureExtractor.from_pretrained(folder).do_normalize)
        else:
            raise ValueError(f"{name} is a {self.kind} model: we know Whisper, HuBERT, WavLM and wav2vec 2.0")
        # one normalised over time (HuBERT-base) would notice its neighbours' padding
        self.can_mask = getattr(config, "feat_extract_norm", "layer") == "layer"
        if hop != HOP:
            raise ValueError(f"{name} makes {SAMPLE_RATE / hop:g} frames a second, we need {FRAME_HZ:g}")
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"{name} has {depth} layers: no layer {layer}")
        self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, wav):
        """wav (n,) float32 at 16 kHz -> (T, C) float32 on the CPU."""
        return self.features_all([wav])[0].cpu()

    @torch.no_grad()
    def features_all(self, wavs):
        """[(n,)] -> [(T, C)], in batches of windows of similar length; alone or together, all the same."""
        size, context, jobs, parts = int(WINDOW_S * FRAME_HZ), int(CONTEXT_S * FRAME_HZ), [], []
        for i, wav in enumerate(wavs):
            T = -(-len(wav) // HOP)
            if self.kind != "whisper" and self.normalise:       # the whole, so that windows agree
                wav = (wav - wav.mean()) / np.sqrt(wav.var() + 1e-7)
            wav = np.pad(wav, (0, T * HOP - len(wav)))
            for first, end, kept, end_kept in windows(T, size, context):
                jobs.append((wav[first * HOP:end * HOP], i, kept - first, end_kept - first))
        order, states = sorted(range(len(jobs)), key=lambda j: len(jobs[j][0])), [None] * len(jobs)
        while order:
            n, longest = 1, len(jobs[order[-1]][0])
            while n < len(order) and self.together(len(jobs[order[-n - 1]][0]), longest, n + 1):
                n += 1
            batch, order = order[-n:], order[:-n]
            for j, found in zip(batch, self.run([jobs[j][0] for j in batch])):
                states[j] = found
        for i in range(len(wavs)):
            parts.append(torch.cat([found[kept:end] for found, (_, owner, kept, end) in zip(states, jobs)
                                    if owner == i]))
        return parts

    def together(self, length, longest, n):
        """May a window of `length` samples be the n-th of a batch with windows of up to `longest`?"""
        if self.kind == "whisper":
            return n * WINDOW_S <= self.batch_s
        return n * longest <= self.batch_s * SAMPLE_RATE and (self.can_mask or length == longest)

    def run(self, wavs):
        """Windows of at most 30 s, whole frames -> [(T, C)]."""
        lengths = [len(wav) // HOP for wav in wavs]
        if self.kind == "whisper":      # always sees 30 s, the rest silence
            x, mask = self.prepare(wavs, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features, {}
        elif self.kind == "xeus":       # as OpusLM: a frame begins where its 20 ms begin
            x = [torch.from_numpy(np.pad(wav, (0, 80)).astype(np.float32)) for wav in wavs]
            n = torch.tensor([len(wav) for wav in x])
            x = torch.nn.utils.rnn.pad_sequence(x, batch_first=True)
            _, states, _ = self.model.inference_encode(x.to(self.device), n.to(self.device), use_mask=False,
                                                       use_final_output=False)
            if not -len(states) <= self.layer < len(states):
                raise ValueError(f"XEUS has {len(states)} blocks, counted from 0: no layer {self.layer}")
            return [row[:T].float() for row, T in zip(states[self.layer], lengths)]
        else:                           # without padding in its convolutions: a frame spans 400 samples
            wavs = [torch.from_numpy(np.pad(wav, 40).astype(np.float32)) for wav in wavs]
            x = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(wav)).long() for wav in wavs], True)
            mask = {} if mask.all() else {"attention_mask": mask.to(self.device)}
        states = self.model(x.to(self.device), output_hidden_states=True, **mask).hidden_states[self.layer]
        return [row[:T].float() for row, T in zip(states, lengths)]


# ---- neural codecs -----------------------------------------------------------------------------------------

class Lyra:
    """Lyra v2's SoundStream: 64 numbers for every 20 ms; quantised here, by its own or fitted code books."""

    def __init__(self, folder):
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise ValueError("Lyra needs ai-edge-litert: pip install -e '.[codecs]'") from None
        self.load = lambda name: Interpreter(f"{folder}/{name}.tflite", num_threads=1)
        self.own = torch.from_numpy(np.load(f"{folder}/codebooks.npy"))     # (46, 16, 64)

    def start(self, name):
        """A stateful network that has heard silence -> function (T, n) -> (T, m), which remembers what it
        got. Loaded anew for each utterance: after reset_all_variables it still knows the one before."""
        model = self.load(name)
        model.allocate_tensors()
        source, target = model.get_input_details()[0], model.get_output_details()[0]

        def run(rows):
            out = []
            for row in rows:
                model.set_tensor(source["index"], row.reshape(source["shape"]))
                model.invoke()
                out.append(model.get_tensor(target["index"]).flatten())
            return np.stack(out)

        return run

    def features(self, wav):
        """wav (n,) at 16 kHz -> (T, 64), T = ceil(n / HOP)."""
        T = -(-len(wav) // HOP)
        frames = np.pad(wav, (0, T * HOP - len(wav))).reshape(T, HOP)
        return torch.from_numpy(self.start("soundstream_encoder")(frames))

    def sound(self, features):
        """(T, 64) -> wav (T * HOP,)."""
        return self.start("lyragan")(features.numpy()).flatten()


class NeuralCodec:
    """DAC, X-codec, EnCodec or Mimi of transformers, or ESPnet's codec (a .pth file with config.yaml beside):
    its first n_level levels of codes, frame_hz times a second (None: any number of times)."""

    def __init__(self, name, n_level=8, device="cpu", frame_hz=FRAME_HZ):
        if name.endswith(".pth"):
            self.model, self.kind = espnet_model("gan_codec", name, device), "espnet"
            about, self.n_level, self.device = self.model.meta_info(), n_level, device
            self.rate, self.n_code = about["fs"], about["code_size_per_stream"][0]
            self.check_rate(name, frame_hz)
            return
        from transformers import AutoConfig, AutoModel
        folder = find_folder(name, WEIGHTS)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in ("dac", "encodec", "mimi", "xcodec"):
            raise ValueError(f"{name} is a {config.model_type} model: we know DAC, EnCodec, Mimi and X-codec")
        self.kind = config.model_type
        self.rate = config.sample_rate if self.kind == "xcodec" else config.sampling_rate
        self.n_level, self.device = n_level, device
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.model.requires_grad_(False)
        self.n_code = config.codebook_size
        # EnCodec leaves levels out to keep to a bandwidth, and at its usual, the lowest one, most of them
        self.most = {"bandwidth": config.target_bandwidths[-1]} if self.kind == "encodec" else {}
        self.check_rate(name, frame_hz)

    def check_rate(self, name, frame_hz):
        found = len(self.codes(np.zeros(8 * self.rate, np.float32))) / 8
        if frame_hz and abs(found - frame_hz) > 0.5:
            raise ValueError(f"{name} makes {found:.4g} frames a second, we need {frame_hz:g}; DAC at 16 kHz "
                             f"and X-codec make 50. To take it as it is: --frame_hz={found:.4g}")

    @torch.no_grad()
    def codes(self, wav):
        """wav (n,) at the codec's own rate -> (T, n_level)."""
        x = torch.from_numpy(wav)[None, None].to(self.device)
        if self.kind == "espnet":
            codes = self.model.encode(x).transpose(0, 1)                    # (1, n_level, T)
        else:
            codes = self.model.encode(x, **self.most).audio_codes
        codes = codes[0] if codes.ndim == 4 else codes                      # EnCodec: chunks first
        if codes.shape[1] < self.n_level:
            raise ValueError(f"the codec has {codes.shape[1]} levels, {self.n_level} are wanted")
        return codes[0, :self.n_level].T.cpu()                              # (T, n_level)

    @torch.no_grad()
    def sound(self, codes):
        """codes (T, n_level) -> wav at the codec's own rate."""
        codes = codes.T[None].to(self.device)                               # (1, n_level, T)
        if self.kind == "encodec":
            wav = self.model.decode(codes[None], [None]).audio_values
        elif self.kind == "espnet":
            wav = self.model.decode(codes.transpose(0, 1))
        elif self.kind == "dac":
            wav = self.model.decode(audio_codes=codes).audio_values
        else:
            wav = self.model.decode(codes).audio_values
        return wav.flatten().cpu().numpy()


# ---- both together -----------------------------------------------------------------------------------------

class PretrainedTokenizer:
    """encode, decode, save, load and the sizes, as any tokenizer of ours (tokenize_audio.Tokenizer)."""
    sample_rate = SAMPLE_RATE

    def __init__(self, about, arrays, folder="", device="cpu"):
        """about: {"semantic": {encoder, layer}, "acoustic": {codec, levels, codes, perhaps frame_hz}}
        arrays: clusters (K, C) of features, less their mean and over their std (C,) where those are given;
        books (levels, codes, 64) for Lyra.  Encoder and codec are folders in `folder` ("." for Lyra, whose
        files it has), folders elsewhere, or hub ids; they are loaded when first needed."""
        self.about, self.arrays, self.folder, self.device = about, arrays, folder, device
        self.n_semantic = len(arrays["clusters"])
        books = arrays.get("books")
        self.n_level, self.n_acoustic = about["acoustic"]["levels"], about["acoustic"]["codes"]
        self.frame_hz = about["acoustic"].get("frame_hz", FRAME_HZ)
        assert books is None or books.shape[:2] == (self.n_level, self.n_acoustic)
        self.encoder = self.codec = None

    def start(self, encode):
        semantic, acoustic = self.about["semantic"], self.about["acoustic"]
        try:
            if encode and self.encoder is None:
                where = self.place(semantic["encoder"])
                self.encoder = SpeechEncoder(where, semantic["layer"], self.device)
            if self.codec is None:
                where = self.place(acoustic["codec"])
                self.codec = (Lyra(where) if "books" in self.arrays else
                              NeuralCodec(where, self.n_level, self.device, self.frame_hz))
        except ValueError as problem:
            raise ValueError(f"{problem}. Where its networks are stands in {self.folder}/audio_tokenizer.json"
                             ) from None

    def place(self, name):
        """The folder of that name in ours, or the name as it is."""
        return f"{self.folder}/{name}" if os.path.isdir(f"{self.folder}/{name}") else name

    def encode(self, wav, sr=SAMPLE_RATE):
        """wav (n,) or (n, channels) at sr Hz -> codes (T, N) int16, semantic ones first; T about
        n / sr * frame_hz."""
        return self.encode_all([to_mono_16k(wav, sr)])[0]

    def encode_all(self, wavs):
        """[(n,)] at 16 kHz -> [(T, N)]."""
        self.start(True)
        return [self.join(wav, features) for wav, features in zip(wavs, self.encoder.features_all(wavs))]

    def join(self, wav, features):
        """wav (n,) at 16 kHz and its semantic features (T, C) -> codes (T, N) int16."""
        if "mean" in self.arrays:
            mean, std = (self.arrays[name].to(features.device) for name in ("mean", "std"))
            features = (features - mean) / std
        semantic = nearest(features, self.arrays["clusters"].to(features.device)).cpu()     # (T,)
        if "books" in self.arrays:
            acoustic = quantise(self.codec.features(wav), self.arrays["books"], BEAM)       # (T', levels)
        else:
            acoustic = self.codec.codes(soxr.resample(wav, SAMPLE_RATE, self.codec.rate))
        expected = len(semantic) * self.frame_hz / FRAME_HZ
        if abs(expected - len(acoustic)) > 1:
            raise ValueError(f"{expected:g} semantic and {len(acoustic)} acoustic frames do not fit")
        if self.frame_hz != FRAME_HZ:       # what is said at the middle of each frame of the codec
            middle = (torch.arange(len(acoustic)) + 0.5) * FRAME_HZ / self.frame_hz
            semantic = semantic[middle.long().clamp_max(len(semantic) - 1)]
        T = min(len(semantic), len(acoustic))
        return torch.cat([semantic[:T, None], acoustic[:T]], 1).numpy().astype(np.int16)    # (T, N)

    def decode(self, codes):
        """codes (T, N) -> wav (n,) float32 at 16 kHz, n = T / frame_hz * 16000."""
        codes = torch.as_tensor(np.asarray(codes), dtype=torch.long)[:, -self.n_level:]     # (T, levels)
        if len(codes) == 0:
            return np.zeros(0, np.float32)
        self.start(False)
        n = round(len(codes) * SAMPLE_RATE / self.frame_hz)
        if "books" in self.arrays:
            wav = self.codec.sound(self.looked_up(codes))
        else:
            wav = soxr.resample(self.codec.sound(codes), self.codec.rate, SAMPLE_RATE)
        wav = np.pad(wav, (0, max(0, n - len(wav))))[:n]
        return (wav / max(1.0, np.abs(wav).max())).astype(np.float32)

    def looked_up(self, codes):
        """Lyra's codes (T, levels) -> features (T, 64)."""
        return sum(book[code] for book, code in zip(self.arrays["books"], codes.T))

    def start_decoding(self):
        """For speech that is still being made: function codes (T, N) -> wav (T * HOP,) that goes on where it
        stopped; the pieces are the whole, but for its loudness where that clips. None if the codec can't."""
        if "books" not in self.arrays:
            return None
        self.start(False)
        run = self.codec.start("lyragan")

        def decode_next(codes):
            codes = torch.as_tensor(np.asarray(codes), dtype=torch.long)[:, -self.n_level:]     # (T, level)
            return run(self.looked_up(codes).numpy()).flatten().clip(-1, 1)

        return decode_next

    def save(self, folder, whole=False):
        """whole: with copies of the encoder and the codec, where those are folders, and not on the hub."""
        os.makedirs(folder, exist_ok=True)
        about = {part: dict(self.about[part]) for part in ("semantic", "acoustic")}
        for part, network in (("semantic", "encoder"), ("acoustic", "codec")):
            name = about[part][network]
            source = self.place(name)
            if name != "." and os.path.isdir(source) and (whole or source != name):     # ours stays so
                os.makedirs(f"{folder}/{network}", exist_ok=True)
                for file in filter(os.listdir(source).__contains__, WEIGHTS):
                    shutil.copy(f"{source}/{file}", f"{folder}/{network}/{file}")
                about[part][network] = network
        for name in LYRA_FILES if self.about["acoustic"]["codec"] == "." else ():
            shutil.copy(f"{self.folder}/{name}", f"{folder}/{name}")
        save_file({name: array.contiguous().numpy() for name, array in self.arrays.items()},
                  f"{folder}/codebooks.safetensors")
        with open(f"{folder}/audio_tokenizer.json", "w") as f:
            json.dump({"kind": "pretrained", "version": VERSION, **about}, f, indent=1)

    @classmethod
    def load(cls, folder, about, device="cpu"):
        if about["version"] != VERSION:
            raise ValueError(f"{folder}: tokenizer version {about['version']}, we read {VERSION}")
        missing = [f"fit-{part}" for part in ("semantic", "acoustic") if part not in about]
        if missing:
            raise ValueError(f"{folder} is half a tokenizer: run tokenize_audio.py {missing[0]} too")
        arrays = load_file(f"{folder}/codebooks.safetensors")
        return cls({part: about[part] for part in ("semantic", "acoustic")},
                   {name: torch.from_numpy(array) for name, array in arrays.items()}, folder, device)
