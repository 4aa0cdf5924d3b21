"""Claim: what the chapters in docs/ say is true: their code runs, and their exercises come out as stated."""
import re
import shutil

import pytest
from conftest import ROOT, run_here

from data import Dataset

CHAPTERS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_code_of_a_chapter_runs(chapter, tiny_run, tiny_data, tmp_path, monkeypatch):
    """In a folder where out/numbers is a tiny run and voice.wav a recording; blocks share their names."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / chapter).read_text(), re.S)
    if not blocks:
        pytest.skip("a page without code")
    shutil.copytree(tiny_run, tmp_path / "out/numbers")
    shutil.copy(Dataset(tiny_data, "train").info["audio"][0], tmp_path / "voice.wav")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"docs/{chapter}, block {number}", "exec"), names)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_picture_is_drawn_from_the_data(tiny_data, tmp_path):
    """Both tasks, with the words of one real utterance, which matplotlib notes beside its glyphs."""
    code, out, err = run_here(ROOT / "docs/draw.py", tiny_data, tmp_path / "sequences.svg")
    assert code == 0 and out.strip() == str(tmp_path / "sequences.svg"), err
    drawn = (tmp_path / "sequences.svg").read_text()
    said = {task: re.search(f'{task}, "(.+)": tokens', drawn)[1] for task in ("recognition", "synthesis")}
    assert said["recognition"] == said["synthesis"]
    assert said["recognition"] in Dataset(tiny_data, "train").info["text"]
