"""Claim: every command of README and docs/ runs, here in small, or says what it needs that is not here."""
import os
import re
import shlex
import shutil
import subprocess
import sys

from conftest import ROOT, run_here

import prepare
from data import Dataset

ELSEWHERE = [       # .ci/run installs and tests; test_demo.py opens the page; test_train.py runs the last two
    "pip install -e . && python train.py configs/numbers.py", "pip install -e '.[test]' && pytest",
    "pip install -e '.[demo]' && python demo.py",
    "python train.py configs/numbers.py --max_steps=20", "torchrun --nproc_per_node=2 train.py"]


def commands():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(tuple(ELSEWHERE))]
    return [line for line in lines if not re.search("needs (data|GPU)", line)]


def in_small(command, flags):
    """The command as a list of words, with our Python and, later flags win, tiny settings."""
    program, *words = shlex.split(command, comments=True)
    launch = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[program]
    if "train.py" in words or "prepare.py" in words:
        known = [*prepare.SETTINGS, "data_dir"]
        flags = flags if "train.py" in words else [f for f in flags if f[2:].split("=")[0] in known]
        words += [*flags] + ["--text_vocab=290"] * ("--text_model=bpe" in words)
    if "bench.py" in words:
        words += ["--size=numbers", "--turns=1", "--lengths=48", "--batch=1", "--frames=4", "--only=grammar",
                  "--no-memory"]
    if "plan.py" in words:
        words += ["--n_layer=1", "--row_frames=512", "--n_text=500"]
    return [sys.executable, *launch, *words]


def test_every_command_runs(tiny_run, tiny_data, tiny_flags, tmp_path, monkeypatch):
    """In a folder where out/numbers is a tiny run, voice.wav a recording, and my/ holds a small corpus."""
    shutil.copytree(tiny_run, tmp_path / "out/numbers")
    info, fields = Dataset(tiny_data, "train").info, ("id", "audio", "text", "speaker")
    shutil.copy(info["audio"][0], tmp_path / "voice.wav")
    os.makedirs(tmp_path / "my")
    rows = [fields, *([info[field][i] for field in fields] for i in range(120))]
    (tmp_path / "my/manifest.tsv").write_text("\n".join("\t".join(row) for row in rows))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for script in ROOT.glob("*.py"):
        (tmp_path / script.name).symlink_to(script)
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_flags, "--max_steps=2", "--tts_utterances=2", "--max_speech_s=0.5"]
    for command in commands():
        words = in_small(command, flags)
        if words[1] not in ("-m", "train.py", "prepare.py"):        # those start processes of their own
            code, out, err = run_here(*words[1:])
            absent = code == 3 and "not available: pip install" in out     # by an extra that is not installed
            assert code == 0 or absent, f"{command}\n{out}\n{err}"
            continue
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    assert len(commands()) >= 12
