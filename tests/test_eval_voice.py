"""Claim: voices are measured beside recordings and strangers, by the judges that are there; none is faked."""
import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, run_here

from eval_voice import measure_voices


def tone(hz, seconds=1.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


def test_each_group_gets_each_measure_with_its_interval():
    def embed(wav):         # a "voice" is the frequency with the most energy, high or low
        low = np.abs(np.fft.rfft(wav)).argmax() / len(wav) * 16000 < 200
        return np.array([1.0, 0.0] if low else [0.0, 1.0])

    prompts, texts = [tone(100)] * 4, ["four letters"] * 4
    groups = {"own": ([tone(110, 2)] * 4, texts), "half": ([tone(110), tone(300)] * 2, texts),
              "other": ([tone(300)] * 4, ["two"] * 4)}
    found, items = measure_voices(groups, prompts, embed, [lambda wav: {"MOS": 3.0}])
    assert found["own"]["seconds"] == (2, 2, 2) and found["other"]["letters a second"] == (3, 3, 3)
    assert found["own"]["similarity"] == (1, 1, 1) and found["other"]["similarity"][0] == 0
    mean, low, high = found["half"]["similarity"]
    assert mean == 0.5 and low < 0.3 and high > 0.7
    assert found["own"]["letters a second"][0] == pytest.approx(11 / 2) and found["own"]["MOS"][0] == 3
    assert items["voice, similarity"] == [[text, 1, 1] for text in texts], "one each, of the first group"


def test_pitch_is_the_tones():
    pytest.importorskip("librosa")
    from eval_voice import pitch_meter
    found = pitch_meter()(tone(150, 2))
    assert found["pitch, Hz"] == pytest.approx(150, rel=0.02) and found["pitch spread, semitones"] < 1


class Utmos(torch.nn.Module):
    """A stand-in: three points, and one more where it is loud."""
    @torch.jit.export
    def score(self, wav: torch.Tensor) -> torch.Tensor:
        return 3 + (wav.abs().max() > 0.2).float()[None]


def test_utmos_is_its_file(tmp_path):
    from eval_voice import load, utmos_scorer
    torch.jit.script(Utmos()).save(f"{tmp_path}/utmos.pt")
    score, missing = utmos_scorer(f"{tmp_path}/utmos.pt"), {}
    assert score(tone(150)) == {"UTMOS": 4} and score(0.1 * tone(150)) == {"UTMOS": 3}
    (tmp_path / "none.pt").write_text("no model")
    assert load("UTMOS", "", missing, utmos_scorer, f"{tmp_path}/none.pt") is None and missing["UTMOS"]


def test_the_command_says_what_is_missing_and_leaves_lists_for_versa(tiny_run, monkeypatch):
    for package in ("resemblyzer", "speechmos", "librosa"):
        monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run_here(ROOT / "eval_voice.py", tiny_run, "--n=3")
    assert code == 3, err
    assert out.count("not available: pip install") == 3
    lines = open(f"{tiny_run}/voices/wav.scp").read().splitlines()
    assert [line.split()[0] for line in lines] == ["0000", "0001", "0002"]
    assert all(soundfile.info(line.split()[1]).samplerate == 16000 for line in lines)
    found = json.load(open(f"{tiny_run}/results_n3.json"))["voice"]
    assert len(json.load(open(f"{tiny_run}/items_n3.json"))["voice, seconds"]) == 3
    assert found["n"] == 3 and set(found["the model"]) == {"seconds", "letters a second"}
    assert set(found["not_available"]) == {"similarity", "DNSMOS", "pitch"}
