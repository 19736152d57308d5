"""Who may know whom: Ray stays at the edge, plain functions below it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.words import short_path

PACKAGE = Path(vlskv_ray.__file__).parent
FLOORS = (
    {"words", "files", "errors"},
    {"config"},
    {"command"},
    {"model"},
    {"data"},
    {"training"},
    {"storage"},
    {"evaluation"},
    {"report"},
    {"cluster"},
    {"train_loop"},
    {"launch"},
    {"sweep"},
)
"""From the ground up; a room knows what lies below it, the commands know all of them, and nobody knows a command."""
COMMANDS = {"cache", "compare", "doctor", "evaluate", "generate", "probe", "train", "tune"}
KNOW_NO_CONFIG = {"words", "files", "errors", "model", "data", "evaluation"}
"""They are plain functions of plain values."""
KNOW_RAY = {"cluster", "launch", "sweep", "data/pipeline"}
"""The edge."""


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, set[str]]:
    """By path without `.py`, all but the package's own `__init__`."""
    files = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in PACKAGE.rglob("*.py")}
    return {name: imports(file) for name, file in files.items() if name != "__init__"}


def room_of(name: str) -> str:
    return name.replace(".", "/").split("/")[0]


def known_rooms(found: set[str]) -> set[str]:
    return {room_of(name.removeprefix("vlskv_ray.")) for name in found if name.startswith("vlskv_ray.")} - {
        "__version__"
    }


def test_every_room_knows_only_those_below_it() -> None:
    below: set[str] = set()
    allowed: dict[str, set[str]] = {}
    for floor in FLOORS:
        allowed |= {room: below | {room} for room in floor}
        below |= floor
    for name, found in modules().items():
        room = room_of(name)
        beyond = known_rooms(found) - (below if room in COMMANDS else allowed[room])
        assert not beyond, f"{name} knows {beyond}"


def test_plain_functions_know_no_config() -> None:
    for name, found in modules().items():
        if room_of(name) in KNOW_NO_CONFIG:
            assert "config" not in known_rooms(found), name


def test_ray_stays_at_the_edge() -> None:
    for name, found in modules().items():
        if not {name, room_of(name)} & KNOW_RAY:
            assert not any(i.split(".")[0] == "ray" for i in found), name


def test_the_method_imports_nothing_of_ours() -> None:
    """It travels with exported checkpoints."""
    assert not known_rooms(modules()["model/swiftkv"])


def test_importing_registers_the_models_and_does_nothing_else() -> None:
    """No Ray, no data library, no thread setting, no word printed."""
    code = (
        "import torch, sys; threads = torch.get_num_threads(), torch.random.get_rng_state().sum().item()\n"
        "import vlskv_ray\n"
        "from transformers import CONFIG_MAPPING\n"
        "assert 'llama_swiftkv' in CONFIG_MAPPING\n"
        "assert not {'ray', 'datasets'} & set(sys.modules), sys.modules\n"
        "assert threads == (torch.get_num_threads(), torch.random.get_rng_state().sum().item())\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize("command", ["cache", "compare", "doctor", "evaluate", "generate", "probe", "train", "tune"])
def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "gone").mkdir()
    start = 'cd "$0" && rmdir "$0" && exec "$@"'
    result = subprocess.run(
        ["sh", "-c", start, str(tmp_path / "gone"), sys.executable, "-m", f"vlskv_ray.{command}", "--help"],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    told = "the working directory of this command has been deleted; `cd` to one that is there\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", told)


def test_paths_are_shown_when_the_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be deleted while a run lasts."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert short_path(tmp_path / "gone" / "x") == Path("x")
    (tmp_path / "gone").rmdir()
    assert short_path(tmp_path / "gone" / "x") == tmp_path / "gone" / "x"
