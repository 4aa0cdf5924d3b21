"""Claim: a setting is known and of its type, or the error names the closest; flags stack on files and win."""
import dataclasses

import pytest
from conftest import ROOT

import prepare
from config import Config, check, load_config, read_config, save_config
from convert import KNOWN_BODIES
from interleave import Vocab
from parallel import meta_model


def test_flags_win_over_the_file(tmp_path):
    (tmp_path / "c.py").write_text("_base = 100\nmax_steps = 5 * _base   # arithmetic is welcome\nlr = 1\n")
    config = load_config(["--max_steps=7", str(tmp_path / "c.py"), "--out_dir=out/7", "--mixture={'asr': 1}"])
    assert (config.max_steps, config.lr, config.out_dir, config.mixture) == (7, 1.0, "out/7", {"asr": 1})
    assert type(config.lr) is float
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("flag, message", [
    ("--max_step=3", "did you mean 'max_steps'"), ("--lr=fast", "takes float, not str"),
    ("--max_steps=1.5", "takes int"), ("--mixture=[1]", "takes dict"),
    ("--max_steps", "write --max_steps=value"), ("configs/none.py", "no config file"),
    ("--splice_frames=500 --recombine_frames=500", "set one of them to 0"),
    ("--guidance=2 --mixture={'tts':1}", "a little of the task speech"), ("--save_every=0", "1 at least"),
    ("--mixture={'asr':0}", "no task has a weight"), ("--mixture={'asr':'1'}", "takes a number"),
    ("--datasets={'a':2,'b':-1}", "takes a number"), ("--n_head=0", "1 at least"),
    ("--top_k=0", "top_k is 1 at least"),
    ("--semantic_asr=True --token_streams=acoustic", "leaves out")])
def test_wrong_settings_name_the_way_out(flag, message):
    with pytest.raises(ValueError, match=message):
        load_config(flag.split())


def test_every_config_file_is_valid_and_prepare_shares_our_names():
    for path in (ROOT / "configs").glob("*.py"):
        load_config([str(path)])
    for name, default in prepare.SETTINGS.items():
        ours = getattr(Config(), name)
        assert check(name, default) == ours, f"{name} differs between prepare.SETTINGS and Config"


@pytest.mark.parametrize("name, n_text, size", [
    ("135m", 49152, 178.4), ("360m", 49152, 435.0), ("1.7b", 49152, 1867.4), ("7b", 100352, 7409.4)])
def test_the_four_sizes_have_the_published_parameter_counts(name, n_text, size):
    """In millions, with the vocabulary of the published checkpoints; built without memory."""
    config = load_config([str(ROOT / f"configs/{name}.py")])
    model = meta_model(config, Vocab(config.n_semantic, config.n_acoustic, config.n_level, n_text, n_tail=70))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == size
    body = KNOWN_BODIES[config.n_layer, config.d_model]
    assert body == {field: getattr(config, field) for field in body}
    assert 0.9e6 < config.batch_rows * config.row_frames < 1.1e6 and config.text_model == config.init_from


@pytest.mark.parametrize("name, change", [
    ("batch4m", {"batch_rows", "grad_accum", "max_steps"}), ("semantic", {"token_streams"}),
    ("acoustic", {"token_streams"}), ("text_ood", {"corpus"})])
def test_an_ablation_differs_from_its_parent_in_one_thing(name, change):
    parent, config = (load_config([str(ROOT / f"configs/1.7b{part}.py")]) for part in ("", f"_{name}"))
    fields = [field.name for field in dataclasses.fields(config)]
    differing = {field for field in fields if getattr(config, field) != getattr(parent, field)}
    assert differing == change | {"out_dir"}
    frames = [c.batch_rows * c.row_frames * c.max_steps for c in (parent, config)]
    assert frames[0] == frames[1], "what differs, differs at equal frames"
