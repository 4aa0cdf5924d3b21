"""Claim: every file can be read in one sitting, and the README's figures about the code are true."""
import ast
import re
import subprocess
import sys

from conftest import ROOT


def counts():
    return {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}


def test_files_stay_under_their_caps():
    for name, lines in counts().items():
        assert lines <= (350 if name in ("model.py", "train.py") else 400), f"{name} has {lines} lines"
    for path in (ROOT / "tests").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, f"{path.name} is a lesson too long"


def test_the_readme_states_the_true_line_counts():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", readme, re.M)
    stated = {name: int(lines) for name, lines in rows}
    assert stated == counts()
    assert f"{sum(counts().values())} lines" in readme


def test_no_file_needs_a_later_one():
    """What a file imports when it is read stands above it in the README's table."""
    order = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "README.md").read_text(), re.M)
    for place, name in enumerate(order):
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            needed = ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                      [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert not set(needed) & set(order[place:]), f"{name}.py imports {needed}"


def test_lint_is_clean():
    command = [sys.executable, "-m", "ruff", "check", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
