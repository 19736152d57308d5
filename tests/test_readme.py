"""The README says what is true: its tree is the tree, its commands are commands, its links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from vlskv_ray import evaluate, generate, train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_tree_is_the_tree() -> None:
    """Every file of the package is in it, and nothing else."""
    (tree,) = [block for block in blocks("text") if block.startswith("vlskv_ray/\n")]
    folders, listed = ["vlskv_ray"], set()
    for line in tree.splitlines()[1:]:
        match = re.match(r"([│├└─ ]*)([\w./]+)", line)
        assert match is not None, line
        depth, name = len(match[1]) // 4, match[2]
        if depth == 0:
            assert (ROOT / name).is_dir(), name
            continue
        folders = [*folders[:depth], name.rstrip("/")]
        if not name.endswith("/"):
            listed.add("/".join(folders))
            assert line.removeprefix(match[0]).strip(), f"{name}: what is it for?"
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "vlskv_ray").rglob("*.py")}
    assert listed == {file for file in files if file.count("/") == 1 or not file.endswith("/__init__.py")}


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert f"\n{target}: " in makefile


def commands(module: str) -> list[str]:
    text = "\n".join(blocks("bash")).replace("\\\n", " ") + "\n" + "\n".join(re.findall(r"`(python -m [^`]+)`", README))
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith(f"python -m {module} ")]


@pytest.mark.parametrize("module", [generate, evaluate])
def test_its_other_commands_are_understood(module: Any) -> None:
    """By the parser; what they do is tested where they are."""
    (command,) = commands(module.__name__)
    assert module.parse(shlex.split(command)[3:]).model == "runs/quickstart/final"


@pytest.mark.parametrize("command", commands("vlskv_ray.train"))
def test_its_commands_are_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--print-config`, which reads everything that the command names."""
    monkeypatch.chdir(ROOT)
    arguments = [part for part in shlex.split(command)[3:] if part != "--dry-run"]
    assert train.main([*arguments, "--print-config"]) == 0, capsys.readouterr().err
    assert "name_or_path" in capsys.readouterr().out
