"""Claim: pretrained encoders and codecs are tokenizers like our own: 50 Hz, no seams, the same folder."""
import json
import os
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run_here, shared_folder

import prepare
from fit import fit_clusters, spread
from pretrained import BEAM, NeuralCodec, PretrainedTokenizer, SpeechEncoder, windows
from shards import copy_folder
from tokenize_audio import Tokenizer, load_audio, quantise

transformers = pytest.importorskip("transformers")


def noise(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


def hubert_config(kind=transformers.HubertConfig, norm="layer"):
    return kind(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                conv_dim=(8,) * 7, feat_extract_norm=norm, num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2)


def small(folder, config):
    torch.manual_seed(0)
    kind = type(config).__name__.removesuffix("Config")
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return str(folder)


def small_hubert(folder, norm="layer"):
    return small(folder, hubert_config(norm=norm))


def small_wavlm(folder):
    return small(folder, hubert_config(transformers.WavLMConfig))


def small_wav2vec2(folder):
    return small(folder, hubert_config(transformers.Wav2Vec2Config))


def small_whisper(folder):
    return small(folder, transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=16))


def dac_config(rate=16000, **more):
    return transformers.DacConfig(encoder_hidden_size=8, downsampling_ratios=[2, 4, 5, 8], codebook_dim=4,
                                  decoder_hidden_size=32, upsampling_ratios=[8, 5, 4, 2], n_codebooks=12,
                                  codebook_size=32, sampling_rate=rate, **more)


def small_dac(folder, rate=16000):
    return small(folder, dac_config(rate))


def small_encodec(folder):
    """Of its two bandwidths the lower one has two levels only."""
    return small(folder, transformers.EncodecConfig(
        sampling_rate=16000, target_bandwidths=[0.5, 4.0], upsampling_ratios=[8, 5, 4, 2], num_filters=4,
        hidden_size=16, codebook_size=32, codebook_dim=16, num_lstm_layers=1))


def small_xcodec(folder):
    return small(folder, transformers.XcodecConfig(
        target_bandwidths=[4.0], sample_rate=16000, codebook_size=32, codebook_dim=32,
        acoustic_model_config=dac_config(hidden_size=16), semantic_model_config=hubert_config()))


def small_mimi(folder):
    return small(folder, transformers.MimiConfig(
        hidden_size=16, num_filters=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, codebook_size=32, codebook_dim=8, num_quantizers=8,
        vector_quantization_hidden_dimension=8, upsample_groups=16))


def test_windows_keep_every_frame_once_with_context_on_both_sides():
    for n in (1, 1500, 1501, 3000, 12345):
        parts = windows(n, 1500, 100)
        assert [frame for _, _, kept, end in parts for frame in range(kept, end)] == list(range(n))
        for first, end, kept, end_kept in parts:
            assert end - first <= 1500
            assert (first == 0 or kept - first >= 100) and (end == n or end - end_kept >= 100)


@pytest.mark.parametrize("make", [small_hubert, small_wavlm, small_wav2vec2, small_whisper])
def test_an_encoder_makes_a_frame_of_every_20_ms(make, tmp_path):
    encoder = SpeechEncoder(make(tmp_path))
    for n in (1600, 1601, 16000, 50001):
        assert encoder.features(noise(4)[:n]).shape == (-(-n // 320), 16)
    with pytest.raises(ValueError, match="no layer 9"):
        SpeechEncoder(str(tmp_path), 9)


def test_long_audio_has_no_seam(tmp_path):
    """What sees only its surroundings, the convolutions, is the same in windows and at once."""
    encoder, wav = SpeechEncoder(small_hubert(tmp_path), layer=0), noise(65)
    encoder.normalise = False
    torch.testing.assert_close(encoder.features(wav), encoder.run([wav])[0], rtol=1e-4, atol=1e-5)


def group_hubert(folder):
    return small_hubert(folder, "group")


@pytest.mark.parametrize("make", [small_hubert, group_hubert, small_whisper])
def test_utterances_do_not_notice_each_other_in_a_batch(make, tmp_path, monkeypatch):
    """Batches are for GPUs. Where padding would be noticed only windows of one length go together."""
    encoder, wavs = SpeechEncoder(make(tmp_path)), [noise(s, i) for i, s in enumerate((1.0, 35.0, 2.2, 1.0))]
    alone, sizes, run = encoder.features_all(wavs), [], encoder.run
    encoder.batch_s = 100
    monkeypatch.setattr(encoder, "run", lambda batch: sizes.append(len(batch)) or run(batch))
    for one, together in zip(alone, encoder.features_all(wavs)):
        torch.testing.assert_close(one, together, rtol=1e-3, atol=1e-4)
    assert sizes == ([2, 1, 2] if make == group_hubert else [3, 2])


@pytest.mark.parametrize("make", [small_dac, small_encodec, small_xcodec])
def test_a_codec_makes_sound_of_its_codes(make, tmp_path):
    codec = NeuralCodec(make(tmp_path), n_level=8)
    codes = codec.codes(noise(2))
    assert codes.shape == (100, 8) and 0 <= int(codes.min()) <= int(codes.max()) < 32
    assert len(codec.sound(codes)) == pytest.approx(32000, abs=640)


def test_codecs_must_make_50_frames_a_second(tmp_path):
    small_dac(tmp_path / "dac")
    with pytest.raises(ValueError, match="12.5 frames a second"):
        NeuralCodec(small_mimi(tmp_path / "mimi"))
    with pytest.raises(ValueError, match="75 frames a second"):
        NeuralCodec(small_dac(tmp_path / "24k", rate=24000))
    with pytest.raises(ValueError, match="12 levels, 20"):
        NeuralCodec(str(tmp_path / "dac"), n_level=20)
    with pytest.raises(ValueError, match="hubert model"):
        NeuralCodec(small_hubert(tmp_path / "hubert"))


def test_clusters_that_were_interrupted_are_those_that_were_not(tmp_path):
    x = torch.cat([torch.randn(400, 4, generator=torch.Generator().manual_seed(k)) * 0.1 + 3 * torch.randn(
        4, generator=torch.Generator().manual_seed(99 + k)) for k in range(12)]).numpy()
    fit = lambda name, n: fit_clusters(x, 12, str(tmp_path / name), n, 500, say=lambda _: None)
    whole = fit("whole", 100)
    fit("cut", 50)
    torch.testing.assert_close(fit("cut", 100), whole, rtol=0, atol=0)
    nearest = torch.cdist(torch.from_numpy(x), whole).min(1).values
    assert nearest.pow(2).mean() < 0.1, "each of the twelve heaps has its cluster"
    said = []       # how the clusters are used is counted over all frames
    x = np.concatenate([np.zeros((900, 2)), np.ones((50, 2)), 2 * np.ones((50, 2))]).astype(np.float32)
    fit_clusters(x, 3, str(tmp_path / "three"), 20, 100, say=said.append)
    assert "all 1,000 frames" in said[-1] and "3 of 3 clusters" in said[-1]
    entropy = -sum(p * np.log(p) for p in (0.9, 0.05, 0.05))
    assert f"evenly as {np.exp(entropy):.0f} equal" in said[-1]


def test_fitted_by_the_command_line_it_is_a_tokenizer_like_any_other(tmp_path):
    rows = ["id\taudio\ttext\tspeaker\tsplit"]
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", noise(3, i), 16000)
        rows.append(f"{i}\t{i}.wav\tone\ta\ttrain")
    (tmp_path / "m.tsv").write_text("\n".join(rows))
    folder, script = str(tmp_path / "tok"), ROOT / "tokenize_audio.py"
    hubert, dac = small_hubert(tmp_path / "hubert"), small_dac(tmp_path / "dac")
    semantic = ("fit-semantic", folder, tmp_path / "m.tsv")
    code, _, err = run_here(script, *semantic, f"--encoder={hubert}", "--clusters=9")
    assert code == 0, err
    with pytest.raises(ValueError, match="half a tokenizer"):
        Tokenizer.load(folder)
    code, _, err = run_here(script, "fit-acoustic", folder, tmp_path / "m.tsv", f"--codec={dac}")
    assert code == 0, err
    tokenizer, wav = Tokenizer.load(folder), load_audio(tmp_path / "0.wav")
    codes = tokenizer.encode(wav)
    assert codes.shape == (150, 9) and codes.dtype == np.int16 and codes[:, 0].max() < 9
    assert (tokenizer.n_semantic, tokenizer.n_level, tokenizer.n_acoustic) == (9, 8, 32)
    assert len(tokenizer.decode(codes)) == 150 * 320
    code, _, err = run_here(script, *semantic, f"--encoder={hubert}", "--clusters=5", "--layer=1")
    assert code == 0 and Tokenizer.load(folder).n_semantic == 5, "other wishes start anew"
    tokenizer.save(tmp_path / "again")
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "again").encode(wav), codes)
    assert json.load(open(f"{folder}/audio_tokenizer.json"))["semantic"]["encoder"] == hubert
    tokenizer.save(tmp_path / "whole", whole=True)          # to hand on: its networks come along
    for name in ("hubert", "dac"):
        os.rename(tmp_path / name, tmp_path / f"{name}-moved")
    with pytest.raises(ValueError, match="hubert: no such folder.*stands in .*tok/audio_tokenizer.json"):
        Tokenizer.load(folder).encode(wav)
    whole = Tokenizer.load(os.path.relpath(tmp_path / "whole"))
    np.testing.assert_array_equal(whole.encode(wav), codes)
    whole.save(tmp_path / "whole-again")
    (tmp_path / "whole-again/fit-semantic-1").mkdir()       # as prepare.py copies it
    copy_folder(str(tmp_path / "whole-again"), str(tmp_path / "copy"))
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "copy").encode(wav), codes)
    assert not (tmp_path / "copy/fit-semantic-1").exists(), "what was fitted on is large"
    for name in ("hubert", "dac"):
        os.rename(tmp_path / f"{name}-moved", tmp_path / name)
    features = SpeechEncoder(hubert).features(wav)
    features[:, 0] += 1000 * torch.linspace(0, 1, 150)      # a loud dimension that says nothing
    mean, std = spread(features.numpy())
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(std, features.std(0, unbiased=False))
    assert set(tokenizer.arrays) == {"clusters", "mean", "std"}, "so no dimension decides by its size"
    code, _, err = run_here(script, *semantic)
    assert code == 2 and "which encoder" in err


def test_a_codec_of_another_rate_is_taken_where_one_says_so(tmp_path):
    """Mimi's 12.5 frames a second: what is said at the middle of each of them goes with it."""
    folder, script, wav = str(tmp_path / "tok"), ROOT / "tokenize_audio.py", noise(4)
    hubert, mimi = small_hubert(tmp_path / "hubert"), small_mimi(tmp_path / "mimi")
    soundfile.write(tmp_path / "0.wav", wav, 16000)
    (tmp_path / "m.tsv").write_text("id\taudio\ttext\tspeaker\tsplit\n0\t0.wav\tone\ta\ttrain\n")
    for what in (("fit-semantic", folder, tmp_path / "m.tsv", f"--encoder={hubert}", "--clusters=9"),
                 ("fit-acoustic", folder, f"--codec={mimi}", "--frame_hz=12.5")):
        code, _, err = run_here(script, *what)
        assert code == 0, err
    tokenizer = Tokenizer.load(folder)
    codes, features = tokenizer.encode(wav), SpeechEncoder(hubert).features(wav)
    assert codes.shape == (50, 9) and tokenizer.frame_hz == 12.5
    normal = (features - tokenizer.arrays["mean"]) / tokenizer.arrays["std"]
    said = torch.cdist(normal, tokenizer.arrays["clusters"]).argmin(1)      # (200,), at 50 Hz
    assert codes[:, 0].tolist() == said[2::4].tolist()
    assert len(tokenizer.decode(codes)) == 64000
    data = prepare.prepare(prepare.SETTINGS | {"corpus": str(tmp_path / "m.tsv"), "audio_tokenizer": folder},
                           str(tmp_path), n_process=1)
    with open(f"{data}/dataset.json") as f:
        about = json.load(f)
    assert about["frame_hz"] == 12.5 and about["splits"]["train"]["hours"] == pytest.approx(4 / 3600)


class FakeXeus(torch.nn.Module):
    """As espnet's SSL model answers: the last output, those of all blocks, lengths."""
    def inference_encode(self, speech, lengths, use_mask, use_final_output):
        assert not use_mask and not use_final_output and lengths.tolist() == [speech.shape[1]] * len(speech)
        frames = speech.unfold(1, 400, 320)                                 # (B, T, 400), as its convolutions
        return None, [frames[..., :4] + k for k in range(3)], None


class FakeCodec(torch.nn.Module):
    def meta_info(self):
        return {"fs": 16000, "code_size_per_stream": [1024] * 32}

    def encode(self, audio):                                                # (streams, B, T)
        return (audio[:, 0, ::320].abs() * 100).long()[None].repeat(32, 1, 1)

    def decode(self, codes):
        assert codes.shape[0] == 8
        return codes[0][:, None].float().repeat_interleave(320, 2) / 100


def test_opuslms_own_tokens_come_through_espnet(tmp_path, monkeypatch):
    """What we ask of the espnet package and how we read its answers; its weights are not at hand."""
    with pytest.raises(ValueError, match="pip install espnet"):
        SpeechEncoder(str(tmp_path / "xeus.pth"), 2)

    def fake(name, model):
        build = staticmethod(lambda config, path, device: (model(), None))
        return type(name, (), {"build_model_from_file": build})

    modules = {"espnet2.tasks.ssl": {"SSLTask": fake("SSLTask", FakeXeus)},
               "espnet2.tasks.gan_codec": {"GANCodecTask": fake("GANCodecTask", FakeCodec)}}
    for name, content in (modules | {"espnet2": {}, "espnet2.tasks": {}}).items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    with pytest.raises(ValueError, match="config.yaml"):
        SpeechEncoder(str(tmp_path / "xeus.pth"), 2)
    for name in ("xeus.pth", "config.yaml"):
        (tmp_path / name).touch()
    wav = noise(2)
    features = SpeechEncoder(str(tmp_path / "xeus.pth"), 2).features(wav)
    assert features.shape == (100, 4) and torch.allclose(features[7], torch.from_numpy(wav[2240:2244]) + 2)
    with pytest.raises(ValueError, match="3 blocks"):
        SpeechEncoder(str(tmp_path / "xeus.pth"), 18).features(wav)
    codec = NeuralCodec(str(tmp_path / "xeus.pth"), 8)
    assert codec.codes(wav).shape == (100, 8) and (codec.n_code, codec.rate) == (1024, 16000)
    assert codec.sound(codec.codes(wav)).shape == (32000,)


@pytest.mark.skipif(not shared_folder(), reason="no real codec here")
def test_lyras_own_quantisers_give_back_real_speech(tmp_path):
    pytest.importorskip("ai_edge_litert")
    from pretrained import Lyra
    lyra = Lyra(f"{shared_folder()}/models/lyra")
    folder = f"{shared_folder()}/data/LibriSpeech/dev-5h/118/47824"
    name = min(name for name in os.listdir(folder) if name.endswith(".flac"))
    wav = load_audio(f"{folder}/{name}")[:48000]
    x = lyra.features(wav)
    codes = quantise(x, lyra.own, BEAM)
    again = sum(book[code] for book, code in zip(lyra.own, codes.T))
    assert codes.shape == (150, 46) and ((x - again).pow(2).mean() / x.pow(2).mean()) < 0.1
    sound = lyra.sound(again)
    loud = lambda wav: np.log(np.abs(wav[:48000 // 320 * 320]).reshape(-1, 320).mean(1) + 1e-3)
    assert np.corrcoef(loud(wav), loud(sound))[0, 1] > 0.9
    torch.testing.assert_close(lyra.features(wav), x)      # from silence each time
    code, _, err = run_here(ROOT / "tokenize_audio.py", "fit-acoustic", tmp_path,
                            f"--codec={shared_folder()}/models/lyra", "--own", "--levels=16")
    about = json.load(open(tmp_path / "audio_tokenizer.json"))["acoustic"]
    assert code == 0 and about == {"codec": ".", "levels": 16, "codes": 16}, err
    whole = PretrainedTokenizer({"semantic": None, "acoustic": about},
                                {"clusters": torch.zeros(1, 1), "books": lyra.own[:16]}, str(tmp_path))
    whole.codec = lyra                          # 3.2 kbit/s, as Lyra calls it: no fitting, no manifest
    assert (whole.join(wav, torch.zeros(150, 1))[:, 1:] == quantise(x, lyra.own[:16], BEAM).numpy()).all()
    go_on = lyra.start("lyragan")
    pieces = [go_on(rows.numpy()).flatten() for rows in again.split(40)]
    assert np.array_equal(np.concatenate(pieces), sound), "piece by piece as it is made"
