"""Who may know whom: Ray stays at the edge, plain functions below it."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from test_main import HEAVY
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.__main__ import COMMANDS
from vlskv_ray.words import short_path

PACKAGE = Path(vlskv_ray.__file__).parent
FLOORS = (
    {"words", "files", "errors"},
    {"config"},
    {"command"},
    {"model"},
    {"data"},
    {"assembly"},
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
    """By path without `.py`, all but the package's own `__init__` and `__main__`."""
    files = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in PACKAGE.rglob("*.py")}
    return {name: imports(file) for name, file in files.items() if not name.startswith("__")}


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


def run_code(code: str, *options: str, given: bytes = b"") -> None:
    """Runs it in a process of its own, which must print nothing and end well."""
    result = subprocess.run(
        [sys.executable, *options, "-c", code], input=given, capture_output=True, timeout=HANG_SECONDS
    )
    assert (result.returncode, result.stdout) == (0, b""), result.stderr.decode()


REGISTERED = "from transformers import CONFIG_MAPPING; assert 'llama_swiftkv' in CONFIG_MAPPING"


def test_importing_registers_the_models_and_does_nothing_else() -> None:
    """No Ray, no data library, no thread setting, no word printed."""
    run_code(
        "import torch, sys; threads = torch.get_num_threads(), torch.random.get_rng_state().sum().item()\n"
        "from transformers import CONFIG_MAPPING\n"
        "assert 'llama_swiftkv' not in CONFIG_MAPPING\n"
        "import vlskv_ray\n"
        "assert 'llama_swiftkv' in CONFIG_MAPPING\n"
        "assert not {'ray', 'datasets'} & set(sys.modules), sys.modules\n"
        "assert threads == (torch.get_num_threads(), torch.random.get_rng_state().sum().item())\n"
    )


def test_without_transformers_importing_registers_once_it_comes() -> None:
    """To import the package, even twice, and to ask whether transformers is there, imports nothing heavy."""
    run_code(
        "import copy, sys, importlib.util, vlskv_ray\n"
        "finders = len(sys.meta_path)\n"
        "importlib.reload(vlskv_ray)\n"
        "assert len(sys.meta_path) == finders\n"
        "spec = importlib.util.find_spec('transformers')\n"
        "assert copy.copy(spec.loader).get_data(spec.origin)\n"
        "assert spec.origin.endswith('__init__.py') and b'transformers' in spec.loader.get_data(spec.origin)\n"
        f"assert not {HEAVY} & set(sys.modules), sys.modules\n"
        f"{REGISTERED}\n"
        "import transformers\n"
        "importlib.reload(transformers)\n"
        f"{REGISTERED}\n"
        "assert transformers.AutoConfig.for_model('llama_swiftkv').model_type == 'llama_swiftkv'\n"
        "assert not {'ray', 'datasets'} & set(sys.modules), sys.modules\n"
    )


def test_a_pickled_config_is_read_where_nothing_was_imported() -> None:
    """As in a process that was just started."""
    from transformers import AutoConfig

    run_code(
        f"import pickle, sys; config = pickle.load(sys.stdin.buffer); {REGISTERED}\n"
        "assert config.model_type == 'qwen2_swiftkv'",
        given=pickle.dumps(AutoConfig.for_model("qwen2_swiftkv")),
    )


def test_a_transformers_that_fails_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('a word of its own')")
    run_code(
        f"import sys, vlskv_ray; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try: import transformers\n"
        "except ImportError as error: assert str(error) == 'a word of its own'\n"
        "else: raise AssertionError\n"
        f"assert not {HEAVY} & set(sys.modules), sys.modules\n"
    )


def test_a_transformers_that_is_missing_is_missing() -> None:
    run_code(
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import vlskv_ray\n"
        "try: import transformers\n"
        "except ModuleNotFoundError as error: assert error.name == 'transformers'\n"
        "else: raise AssertionError\n",
        *("-I", "-S"),  # no installed packages
    )


@pytest.mark.parametrize("command", COMMANDS)
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
