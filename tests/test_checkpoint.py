"""A checkpoint is real once committed, and used only if every byte is what was written."""

import pickle
from pathlib import Path

import pytest
import torch

from vlskv_ray.checkpoint import newest_checkpoint, newest_step, save_checkpoint, sweep

TENSORS = {"trainable": {"a": torch.arange(5.0), "b": torch.ones(2, 3).T}, "optimizer": {"a.step": torch.tensor(3.0)}}


def saved(root: Path, *steps: int, keep_last: int = 9) -> None:
    for step in steps:
        save_checkpoint(root, step, TENSORS, {"seen": step}, keep_last)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    found = newest_checkpoint(tmp_path, warn=pytest.fail)
    assert found is not None and found.step == 7 and found.state["seen"] == 7
    assert sorted(p.name for p in found.path.iterdir()) == [
        "COMMIT",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "trainable.safetensors",
    ]
    for file, named in TENSORS.items():
        for name, tensor in named.items():
            assert torch.equal(found.tensors(file)[name], tensor)


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 4, 30, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000030"]
    assert newest_step(tmp_path) == 30


def test_the_best_ones_are_kept_beside_them(tmp_path: Path) -> None:
    for step, score in enumerate([5.0, 1.0, 3.0, float("nan"), 2.0, 9.0], start=1):
        save_checkpoint(tmp_path, step, TENSORS, {"score": score} if step != 5 else {}, keep_last=1, keep_best=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003", "step-00000006"]


def test_no_checkpoint_is_step_0(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == newest_step(tmp_path / "nowhere") == 0


FILES = ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json", "COMMIT"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "pickle"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    """One flipped bit, a cut or missing file, a pickle in its place: told, and the one before it is used."""
    saved(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "pickle":
        content = bytearray(pickle.dumps(Evil(tmp_path / "canary")))
    path.write_bytes(content[:-3] if damage == "truncate" else content)
    if damage == "remove":
        path.unlink()
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warn=warnings.append)
    assert found is not None and found.step == 1
    uncommitted = damage == "remove" and file == "COMMIT"  # then it never was one: nothing to warn of
    assert len(warnings) == (0 if uncommitted else 1)
    assert all("step-00000002" in warning and "looking for one before it" in warning for warning in warnings)
    assert not (tmp_path / "canary").exists()


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_what_a_kill_leaves_is_swept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    (tmp_path / ".writing-step-00000003").mkdir()
    assert newest_step(tmp_path) == 1
    sweep(tmp_path, newest=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    saved(tmp_path, 2)
    assert newest_step(tmp_path) == 2


def test_going_back_behind_damaged_ones_loses_nothing(tmp_path: Path) -> None:
    """Steps 4 and 6 damaged: the run goes on from 2, and what it saves then is kept and found, swept or not."""
    saved(tmp_path, 2, 4, 6)
    for step in (4, 6):
        (tmp_path / f"step-{step:08d}" / "trainable.safetensors").write_bytes(b"")
    assert newest_step(tmp_path) == 2
    save_checkpoint(tmp_path, 3, TENSORS, {}, keep_last=2)
    assert newest_step(tmp_path) == 3
    sweep(tmp_path, newest=3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[2:] == ["step-00000002", "step-00000003"] and all(n.startswith("damaged-") for n in names[:2])
    saved(tmp_path, 4, 5, keep_last=2)
    assert newest_step(tmp_path) == 5


def test_files_that_are_no_checkpoints_do_no_harm(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / ".writing-step-1").write_text("a file")
    sweep(tmp_path, newest=1)
    assert newest_step(tmp_path) == 1


def test_of_another_format_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlskv_ray.checkpoint.FORMAT", 99)
    saved(tmp_path, 1)
    monkeypatch.undo()
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warnings.append) is None
    assert "is of format 99, this version reads 3" in warnings[0]
