"""What several lessons share: a toy vocabulary, and a tiny corpus that is made once per test session."""
import contextlib
import fcntl
import io
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import prepare  # noqa: E402
from interleave import Vocab, speech_frames, text_frames  # noqa: E402

TINY = dict(prepare.SETTINGS, corpus_utterances=150, eval_utterances=6, n_semantic=16, n_acoustic=16,
            fit_utterances=60)
TINY_MODEL = dict(n_layer=2, d_model=32, n_head=2, n_kv_head=1, d_ff=64)


def run_here(script, *arguments):
    """Run a script in this process, which has PyTorch loaded already -> exit code, stdout, stderr."""
    before, sys.argv = sys.argv, [str(script), *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(str(script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = before
    return code, out.getvalue(), err.getvalue()


def shared_folder():
    """The folder of real material, where there is one: tests that need it skip elsewhere."""
    folder = pathlib.Path(os.environ.get("NANO_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def toy():
    return Vocab(n_semantic=10, n_acoustic=8, n_level=8, n_text=12)


@pytest.fixture(scope="session")
def toy_example(toy):
    """entries(n_frame, n_text, seed) -> random speech, prompt and text frames in the toy vocabulary."""
    def entries(n_frame=7, n_text=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        codes = torch.stack([torch.randint(end - start, (n_frame + 4,), generator=g)
                             for start, end in toy.streams], 1)
        return {"speech": speech_frames(toy, codes[:n_frame]), "prompt": speech_frames(toy, codes[n_frame:]),
                "text": text_frames(toy, torch.randint(toy.n_text, (n_text,), generator=g))}
    return entries


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_data(data_root):
    """A prepared folder: 150 training and 2 x 6 evaluation utterances of spoken numbers."""
    return prepare.prepare(TINY, data_root)


@pytest.fixture(scope="session")
def tiny_flags(data_root, tiny_data):
    """Command-line flags of a config that uses tiny_data and a tiny model."""
    names = ("corpus_utterances", "eval_utterances", "n_semantic", "n_acoustic", "fit_utterances")
    flags = {name: TINY[name] for name in names}
    flags |= TINY_MODEL | {"data_dir": data_root, "row_frames": 512, "prompt_len": 20}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tiny_flags, tmp_path_factory):
    """The folder of a run of three steps: its model has learned nothing, but everything is in its place."""
    from config import load_config
    from train import train
    out = str(tmp_path_factory.mktemp("run"))
    train(load_config([*tiny_flags, f"--out_dir={out}", "--max_steps=3", "--max_speech_s=0.6"]), tiny_data)
    return out


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The real SmolLM2-135M-Instruct, where the real material is; converted once, outside the checkout."""
    if not shared_folder():
        pytest.skip("no real weights here")
    cache = os.environ.get("NANO_CACHE", os.path.expanduser("~/.cache/nano-opuslm/models"))
    os.makedirs(cache, exist_ok=True)
    with open(f"{cache}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # tests run in two processes
        command = ["bash", shared_folder() / "models/get_models.sh", cache]
        subprocess.run(command, check=True, capture_output=True)
    return f"{cache}/smollm2-135m"
