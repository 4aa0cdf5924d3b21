"""Claim: every command of README and docs/ runs, here in small, or says what it needs that is not here; what
does not run here, or stands amid the text, is understood by its script."""
import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_here
from torch.distributed.run import get_args_parser

import plan
import prepare
from config import Config, load_config, read_arguments
from data import Dataset

ELSEWHERE = [       # .ci/run installs and tests; test_demo.py opens the page; test_train.py runs the last two
    "pip install -e . && python train.py configs/numbers.py", "pip install -e '.[test]' && pytest",
    "pip install -e '.[demo]' && python demo.py",
    "python train.py configs/numbers.py --max_steps=20", "torchrun --nproc_per_node=2 train.py"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def block_lines():
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def commands():
    lines = block_lines()
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


# ---- what is not run is understood -------------------------------------------------------------------------

ELSEWHERE_MADE = "ct2-transformers-converter", "lm_eval"
CONFIGURED = "train.py", "anneal.py", "prepare.py"          # their flags are settings, the others' argparse's


def spans():
    """What stands as code amid the text of all pages, each span in one line."""
    texts = [re.sub(r"```.*?```", "", page.read_text(), flags=re.S) for page in PAGES]
    return [" ".join(span.split()) for text in texts for span in re.findall(r"`([^`]+)`", text)]


def whole_commands():
    """In blocks and amid the text, without comments; a part of one may have a script alone or flags alone."""
    lines = [re.split(" {2,}#", line)[0] for line in [*block_lines(), *spans()]]
    parts = [part.strip() for line in lines for part in re.split("&&|[|] ", line)]
    return [part for part in dict.fromkeys(parts) if re.match("(python|torchrun) .*[.]py", part)]


def has_parser(script):
    return "ArgumentParser(" in (ROOT / script).read_text()


def stop_after(parse):
    def parsed(*given):
        parse(*given)
        raise InterruptedError
    return parsed


def understand(command, monkeypatch):
    """Have its script read a whole command, and stop there. "..." stands for more of the same."""
    program, *words = [word for word in shlex.split(command, comments=True) if word != "..."]
    if program == "torchrun":
        launch = get_args_parser().parse_args(words)
        words = [launch.training_script, *launch.training_script_args]
    script, *words = words
    if words[:1] in (["fit-semantic"], ["fit-acoustic"]):
        script = "fit.py"                                   # tokenize_audio.py hands these on
    if script == "prepare.py":
        prepare.parse_settings(words)
    elif script in CONFIGURED:
        read_arguments([word for word in words if word != "--resume"])
    elif has_parser(script):
        parser = argparse.ArgumentParser
        monkeypatch.setattr(parser, "parse_args", stop_after(parser.parse_args))
        monkeypatch.setattr(plan, "load_config", stop_after(load_config))
        with pytest.raises(InterruptedError):
            importlib.import_module(script.removesuffix(".py")).main(words)
    elif any(word.startswith("-") for word in words):
        raise ValueError(f"{script} has no flags: {words}")


def flags_of(script, *words):
    """All flags of a script, and of its command `words`."""
    if script in CONFIGURED:
        return {f"--{name}" for name in [*vars(Config()), "resume", "part", "device"]}
    return set(re.findall(r"--[\w-]+", run_here(ROOT / script, *words, "--help")[1]))


@pytest.mark.parametrize("command", whole_commands())
def test_every_command_is_understood(command, monkeypatch):
    """Its script is there, its config too, and its flags have such names and values."""
    if "demo.py" in command:
        pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    monkeypatch.chdir(ROOT)
    understand(command, monkeypatch)


@pytest.mark.parametrize("command", [
    "python nothing.py", "python train.py configs/nothing.py", "python train.py --nothing=1",
    "python eval.py out/a --n=many", "torchrun --nothing=1 train.py", "python interleave.py --nothing",
    "python plan.py configs/7b.py --nothing=1", "python prepare.py --nothing=1", "python judge.py nothing a"])
def test_a_wrong_command_is_noticed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, OSError)):
        understand(command, monkeypatch)


def test_flags_amid_the_text_are_there():
    """`eval.py --whisper`, a part of a command, is a flag of that script; `--lower` alone, of one of them."""
    scripts = [path.name for path in ROOT.glob("*.py") if path.name != "demo.py" and has_parser(path.name)]
    known = set().union(*map(flags_of, [*scripts, "train.py"]), flags_of("sample.py", "export"),
                        flags_of("tokenize_audio.py", "fit-acoustic"),
                        *(flags_of("judge.py", what) for what in ("sound", "words", "cost")),
                        get_args_parser()._option_string_actions)
    n = 0
    for span in spans():
        first, *words = span.split()
        flags = {word.split("=")[0] for word in [first, *words] if word.startswith("--")}
        if (ROOT / first).is_file() and flags:
            allowed = flags_of(first, *(word for word in words if not word.startswith("--")))
        else:
            allowed = known
        if first not in ELSEWHERE_MADE:
            assert flags <= allowed, f"`{span}`: there is no {flags - allowed}"
            n += len(flags)
    assert n >= 20


def test_extras_are_there():
    """pip goes on without an extra that it does not know, and says so in one line of many."""
    named = {name for page in PAGES for some in re.findall(r"[.]\[(\w[\w,]*)\]'", page.read_text())
             for name in some.split(",")}
    assert named and named <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
