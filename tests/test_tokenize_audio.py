"""Claim: audio of any form becomes (T, 9) codes at 50 Hz and comes back recognisably; bad audio is named."""
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

from tokenize_audio import (
    HOP,
    Tokenizer,
    align,
    discriminant,
    fit_tokenizer,
    istft,
    load_audio,
    log_mel,
    quantise,
    same_text_pairs,
    save_audio,
    smooth_path,
    stft,
    to_mono_16k,
)


def speechlike(seed, n=16000):
    """A second of noise bursts through a few resonances: enough for frames to differ."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 16000
    f0 = rng.uniform(90, 220)
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2, 5) * t)
    wav = sum(np.sin(2 * np.pi * f0 * k * t) / k * (1 + np.sin(2 * np.pi * (1 + k % 4) * t))
              for k in range(1, 20))
    return (0.1 * envelope * wav / np.abs(wav).max() + 0.001 * rng.standard_normal(n)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer():
    wavs = [speechlike(i) for i in range(24)]
    return fit_tokenizer(wavs, [str(i) for i in range(24)], ["a"] * 24, n_semantic=12, n_acoustic=24,
                         say=lambda *_: None)


def test_codes_have_the_promised_shape_range_and_rate(tokenizer):
    for n in (1024, 16000, 16001, 15999):
        codes = tokenizer.encode(speechlike(1, n))
        assert codes.shape == (-(-n // HOP), 9) and codes.dtype == np.int16
        assert codes.min() >= 0 and codes[:, 0].max() < 12 and codes[:, 1:].max() < 24
        assert len(tokenizer.decode(codes)) == len(codes) * HOP
    assert tokenizer.frame_hz == 50 and len(tokenizer.decode(codes[:0])) == 0


def test_decoding_keeps_the_spectrum_and_more_levels_keep_more(tokenizer):
    wav = speechlike(3)
    mel, codes = log_mel(wav), tokenizer.encode(wav)
    error = (log_mel(tokenizer.decode(codes)) - mel).pow(2).mean().sqrt()
    assert error < 0.5 * mel.std(), "decoded audio is closer to the original than its mean spectrum is"
    partial = [sum(tokenizer.arrays["acoustic"][k][codes[:, k + 1].astype(int)] for k in range(n))
               for n in (1, 4, 8)]
    errors = [float((p - mel).pow(2).mean()) for p in partial]
    assert errors[0] > errors[1] > errors[2]


def test_a_beam_over_levels_loses_less():
    """One that keeps everything finds what trying all codes finds; of 1, it takes the nearest each time."""
    generator = torch.Generator().manual_seed(0)
    x, books = torch.randn(40, 3, generator=generator), torch.randn(3, 5, 3, generator=generator)
    made = lambda codes: sum(book[code] for book, code in zip(books, codes.T))
    lost = {beam: (x - made(quantise(x, books, beam))).pow(2).sum(1) for beam in (1, 4, 125)}
    every = torch.cartesian_prod(*[torch.arange(5)] * 3)                    # (125, 3)
    least = torch.cdist(x, made(every)).pow(2).min(1).values
    torch.testing.assert_close(lost[125], least, rtol=1e-4, atol=1e-4)
    assert lost[4].mean() < 0.9 * lost[1].mean() and (lost[125] <= lost[4] + 1e-5).all()
    first = torch.cdist(x, books[0]).argmin(1)
    second = torch.cdist(x - books[0][first], books[1]).argmin(1)
    assert torch.equal(quantise(x, books)[:, :2], torch.stack([first, second], 1))


def test_istft_inverts_stft():
    wav = torch.from_numpy(speechlike(0, 6400))
    torch.testing.assert_close(istft(stft(wav)), wav, rtol=1e-3, atol=1e-4)


def test_save_and_load_are_exact(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again, wav = Tokenizer.load(tmp_path), speechlike(5)
    assert np.array_equal(again.encode(wav), tokenizer.encode(wav))
    assert np.array_equal(again.decode(again.encode(wav)), tokenizer.decode(tokenizer.encode(wav)))
    with pytest.raises(ValueError, match="run prepare.py first"):
        Tokenizer.load(tmp_path / "nowhere")


def test_eight_khz_stereo_is_the_same_tone_at_16_khz(tmp_path):
    t = np.arange(8000) / 8000
    left = 0.5 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(tmp_path / "s.wav", np.stack([left, 0 * left], 1), 8000)
    wav = load_audio(tmp_path / "s.wav")
    assert wav.ndim == 1 and abs(len(wav) - 16000) < 20
    assert np.abs(np.fft.rfft(wav[:16000])).argmax() == 440


@pytest.mark.parametrize("name, subtype", [("a.flac", "PCM_24"), ("a.ogg", "VORBIS"), ("a.opus", "OPUS"),
                                           ("a.mp3", "MPEG_LAYER_III")])
def test_compressed_audio_is_read(name, subtype, tmp_path):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    soundfile.write(tmp_path / name, tone, 48000, subtype, format={"opus": "OGG"}.get(name[2:]))
    wav = load_audio(tmp_path / name)
    assert abs(len(wav) - 16000) < 1200, "lossy formats may add some silence"
    assert np.abs(np.fft.rfft(wav)).argmax() * 16000 / len(wav) == pytest.approx(440, abs=2)


def test_of_too_long_audio_no_more_is_read_than_shows_it(tmp_path):
    """Ten hours by mistake among utterances cost neither memory nor time."""
    soundfile.write(tmp_path / "long.flac", np.zeros(16000 * 600, np.float32), 16000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer than 2 s"):
        load_audio(str(tmp_path / "long.flac"), longest=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6, "600 s would be 38 MB"
    soundfile.write(tmp_path / "fits.wav", np.zeros(16000 * 3, np.float32), 16000)
    assert len(load_audio(str(tmp_path / "fits.wav"), 1.5, longest=2)) == 32000, "as it is played"
    with pytest.raises(ValueError, match="longer than 2 s"):
        load_audio(str(tmp_path / "fits.wav"), 1.4, longest=2)


def test_resampling_does_not_alias():
    """A 15 kHz tone at 48 kHz lies above 8 kHz: at 16 kHz it must be gone, not folded down to 1 kHz."""
    tone = np.sin(2 * np.pi * 15000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(to_mono_16k(tone, 48000)[200:-200]).max() < 1e-3


@pytest.mark.parametrize("kind, message", [
    ("empty", "at least 64 ms"), ("corrupt", "not readable"), ("missing", "no such file"),
    ("nan", "not finite"), ("raw", "not readable")])
def test_bad_audio_is_named(tmp_path, kind, message):
    path = tmp_path / ("bare.raw" if kind == "raw" else f"{kind}.wav")
    if kind == "raw":
        path.write_bytes(bytes(3200))
    elif kind == "empty":
        soundfile.write(path, np.zeros(0), 16000)
    elif kind == "corrupt":
        path.write_bytes(b"RIFF and then nothing of use")
    elif kind == "nan":
        soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT")
    save_audio(tmp_path / "new" / "folder" / "a.wav", np.zeros(2000))
    assert len(load_audio(tmp_path / "new" / "folder" / "a.wav")) == 2000
    with pytest.raises(ValueError, match="can't be written"):
        save_audio(tmp_path / "a.mp4", np.zeros(100))
    with pytest.raises(ValueError, match=message) as error:
        load_audio(path)
    assert path.name in str(error.value)


def test_a_switch_penalty_finds_the_cheapest_path():
    """Against all paths of a small problem, and: the larger the penalty, the fewer the changes."""
    cost = np.random.default_rng(0).uniform(size=(6, 3))
    paths = np.stack(np.meshgrid(*[range(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
    changes = []
    for penalty in (0.0, 0.5, 10.0):
        price = cost[np.arange(6), paths].sum(1) + penalty * (np.diff(paths) != 0).sum(1)
        found = smooth_path(cost, penalty)
        assert np.array_equal(found, paths[price.argmin()])
        changes.append((np.diff(found) != 0).sum())
    assert changes[0] > changes[1] > changes[2] == 0


def test_alignment_and_discriminant_remove_what_differs_between_speakers():
    """Feature 0 is the sound, feature 1 the speaker: aligned pairs show it, direction 0 ignores it."""
    rng = np.random.default_rng(0)
    sound = torch.from_numpy(rng.standard_normal(40)).float()
    a = torch.stack([sound, torch.zeros(40)], 1)
    b = torch.stack([sound.repeat_interleave(2), torch.full((80,), 5.0)], 1) + 0.01 * torch.randn(80, 2)
    left, right = align(a, b)
    assert (left[1:] >= left[:-1]).all() and (right[1:] >= right[:-1]).all()
    assert (right // 2 == left).float().mean() > 0.9
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    direction = discriminant(x, torch.stack([0.1 * torch.randn(500), 3 * torch.randn(500)], 1), 1)[:, 0]
    assert direction[0].abs() > 10 * direction[1].abs()


def test_pairs_share_the_text_and_not_the_speaker():
    rng = np.random.default_rng(0)
    pairs = same_text_pairs(["x", "y", "x", "x", "y"], ["1", "1", "2", "1", "1"], 10, rng)
    assert len(pairs) <= 1 and all({i, j} <= {0, 2, 3} for i, j in pairs)
    assert not same_text_pairs([""] * 6, list("abcdef"), 10, rng), "no transcript is no common text"
