"""Claim: a setting is known and of its type, or the error names the closest; flags stack on files and win."""
import pytest
from conftest import ROOT

import prepare
from config import Config, check, load_config, read_config, save_config


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
    ("--max_steps", "write --max_steps=value"), ("configs/none.py", "no config file")])
def test_wrong_settings_name_the_way_out(flag, message):
    with pytest.raises(ValueError, match=message):
        load_config([flag])


def test_every_config_file_is_valid_and_prepare_shares_our_names():
    for path in (ROOT / "configs").glob("*.py"):
        load_config([str(path)])
    for name, default in prepare.SETTINGS.items():
        ours = getattr(Config(), name)
        assert check(name, default) == ours, f"{name} differs between prepare.SETTINGS and Config"
