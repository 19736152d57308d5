"""Who may know whom: Ray stays at the edge, plain functions below it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.command import shown

PACKAGE = Path(vlskv_ray.__file__).parent
KNOW_RAY = {
    "cache.py",
    "cluster/start.py",
    "doctor.py",
    "cluster/node.py",
    "cluster/placement.py",
    "cluster/preflight.py",
    "train.py",
    "tune.py",
    "data/pipeline.py",
}
KNOW_THE_CONFIG = {
    "cache.py",
    "cluster/start.py",
    "doctor.py",
    "evaluate.py",
    "launch/prepare.py",
    "probe.py",
    "training/run.py",
    "training/step.py",
    "sweep/trials.py",
    "train.py",
    "tune.py",
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def modules() -> dict[str, set[str]]:
    return {str(file.relative_to(PACKAGE)): imports(file) for file in PACKAGE.rglob("*.py")}


def test_ray_stays_at_the_edge() -> None:
    assert {name for name, found in modules().items() if any(i.split(".")[0] == "ray" for i in found)} == KNOW_RAY


def test_model_data_and_loss_know_no_config_file() -> None:
    outside = {name: found for name, found in modules().items() if not name.startswith("config/")}
    assert {
        n for n, found in outside.items() if any(i.startswith("vlskv_ray.config") for i in found)
    } == KNOW_THE_CONFIG


def test_the_model_knows_neither_data_nor_loss() -> None:
    for name, found in modules().items():
        if name.startswith("model/"):
            assert not any(
                i.startswith(("vlskv_ray.data", "vlskv_ray.training.distill", "vlskv_ray.train")) for i in found
            ), name


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
    assert shown(tmp_path / "gone" / "x") == Path("x")
    (tmp_path / "gone").rmdir()
    assert shown(tmp_path / "gone" / "x") == tmp_path / "gone" / "x"
