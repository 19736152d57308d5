"""A checkpoint is real once committed, and used only if every byte is what was written."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Evil, commit, entry_of, seal, with_state

from vlskv_ray.storage.checkpoint import (
    has_checkpoints,
    newest_checkpoint,
    newest_step,
    remove_unfinished,
    save_checkpoint,
)

TENSORS = {"trainable": {"a": torch.arange(5.0), "b": torch.ones(2, 3).T}, "optimizer": {"a.step": torch.tensor(3.0)}}
STATE = {
    "micro_batches_per_step": 4,
    "shares_per_step": 2,
    "tokens": {"per_image": 3.0, "per_byte": 1},
    "threads": 1,
    "fingerprints": {"model": "a", "data": "b", "versions": "c"},
    "seen": 8,
    "rejected": {"too_long": 1},
    "seconds": 0.5,
    "lengths": {"17": 7},
    "images": {"0": 7},
    "config": {},
}


def saved(root: Path, *steps: int, keep_last: int = 9) -> None:
    for step in steps:
        save_checkpoint(root, step, TENSORS, STATE | {"seen": step}, keep_last)


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
        save_checkpoint(tmp_path, step, TENSORS, STATE | ({"score": score} if step != 5 else {}), 1, keep_best=2)
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


def test_what_a_kill_leaves_is_swept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    (tmp_path / ".writing-step-00000003").mkdir()
    assert newest_step(tmp_path) == 1
    remove_unfinished(tmp_path, newest=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    saved(tmp_path, 2)
    assert newest_step(tmp_path) == 2


def test_going_back_behind_damaged_ones_loses_nothing(tmp_path: Path) -> None:
    """Steps 4 and 6 damaged: the run goes on from 2, and what it saves then is kept and found, swept or not."""
    saved(tmp_path, 2, 4, 6)
    for step in (4, 6):
        (tmp_path / f"step-{step:08d}" / "trainable.safetensors").write_bytes(b"")
    assert newest_step(tmp_path) == 2
    save_checkpoint(tmp_path, 3, TENSORS, STATE, keep_last=2)
    assert newest_step(tmp_path) == 3
    remove_unfinished(tmp_path, newest=3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[2:] == ["step-00000002", "step-00000003"] and all(n.startswith("damaged-") for n in names[:2])
    saved(tmp_path, 4, 5, keep_last=2)
    assert newest_step(tmp_path) == 5


def test_files_that_are_no_checkpoints_do_no_harm(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / ".writing-step-1").write_text("a file")
    remove_unfinished(tmp_path, newest=1)
    assert newest_step(tmp_path) == 1


def test_of_another_format_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlskv_ray.storage.checkpoint.FORMAT", 99)
    saved(tmp_path, 1)
    monkeypatch.undo()
    warnings: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warnings.append) is None
    assert "is of format 99, this version reads 3" in warnings[0]


# ---------------------------------------------------------------------------------- evil or senseless, the hashes right
def with_file(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    commit(folder) if name == "manifest.json" else seal(folder)


def as_link(folder: Path, name: str) -> None:
    elsewhere = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


def as_pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def as_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def whole_folder_as_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


BAD_STATES: list[tuple[str, Any]] = [
    *(("step", value) for value in (-1, 0, 1, 3, 2.0, "2", None, True, 10**30, ..., [2])),
    *(("micro_batches_per_step", value) for value in (0, -4, 2**40, 4.0, "4", 3, None, ...)),
    *(("shares_per_step", value) for value in (0, -1, 2**40, 3, None, ...)),
    *(
        ("tokens", value)
        for value in ({"per_image": float("nan")}, {"per_byte": -1}, {"evil": 1}, {"per_byte": "1"}, [])
    ),
    *(("threads", value) for value in (0, -1, 10**6, "1", 1.5, ...)),
    *(("fingerprints", value) for value in ([], None, {"model": 1}, "x", ...)),
    *(("score", value) for value in ("1", [], {})),
    *(("seen", value) for value in (-1, 1e300, float("inf"), "8", None, ...)),
    *(("rejected", value) for value in ([], {"x": -1}, {"x": 1e9}, {"x": "1"}, None, ...)),
    *(("seconds", value) for value in (float("nan"), float("-inf"), -1, "1", None, ...)),
    *(("lengths", value) for value in ([], {"x": 1}, {"-1": 1}, {"1": 1.5}, {"1" * 40: 1}, {"\u0661": 1}, ...)),
    *(("images", value) for value in (None, {"1": None}, ...)),
    *(("supervised", value) for value in ({"sound": 1}, {"text": -1}, [])),
    *(("empty_steps", value) for value in (-1, "0", None)),
    *(("example", value) for value in ([], {"id": 5}, {"x": "y"})),
    *(("config", value) for value in (None, [], "x", ...)),
    *(("format", value) for value in (None, "3", [], {}, 4, ...)),
]
CRAFTED: dict[str, Callable[[Path], Any]] = {
    **{f"{key} {value!r}": lambda folder, k=key, v=value: with_state(folder, **{k: v}) for key, value in BAD_STATES},
    **{
        f"{name} {content[:12]!r}": lambda folder, n=name, c=content: with_file(folder, n, c)
        for name in ("state.json", "manifest.json")
        for content in (
            *("", "[]", "5", "null", '"x"', "{", "[" * 100_000, '{"a":' * 100_000, "{}", b"\xff", "9" * 5000),
            '{"format": 3, "format": 3}',
        )
    },
    **{
        f"{name} {content[:12]!r}": lambda folder, n=name, c=content: with_file(folder, n, c)
        for name in ("trainable.safetensors", "optimizer.safetensors")
        for content in (
            b"",
            b"junk",
            b"\xff" * 64,
            b"\x02" + bytes(7) + b"{}trailing",
            pickle.dumps(TENSORS["trainable"]),
        )
    },
    **{f"{name} a link": lambda folder, n=name: as_link(folder, n) for name in [*FILES]},
    **{f"{name} a pipe": lambda folder, n=name: as_pipe(folder, n) for name in [*FILES]},
    **{f"{name} a folder": lambda folder, n=name: as_folder(folder, n) for name in [*FILES]},
    **{
        f"named {name}": lambda folder, n=name: seal(folder, **{n: {"sha256": "0" * 64, "bytes": 1}})
        for name in ("../step-00000001/state.json", "/etc/passwd", "extra.bin", "", "a\0b", "COMMIT")
    },
    "a file elsewhere": lambda folder: seal(
        folder, **{"../step-00000001/state.json": entry_of(folder.parent / "step-00000001" / "state.json")}
    ),
    "entries of no kind": lambda folder: seal(folder, **{"state.json": 5}),
    "sizes that differ": lambda folder: seal(folder, **{"state.json": {"sha256": "0" * 64, "bytes": 10**15}}),
    "the folder a link": whole_folder_as_link,
}


@pytest.mark.parametrize("craft", CRAFTED)
def test_a_crafted_one_is_passed_over(tmp_path: Path, craft: str) -> None:
    """One line says which file and what of it is wrong, and the one before is used; nothing is waited for, and nothing
    is lost when the next ones are written."""
    saved(tmp_path, 1, 2)
    CRAFTED[craft](tmp_path / "step-00000002")
    warnings: list[str] = []
    found = newest_checkpoint(tmp_path, warn=warnings.append)
    assert found is not None and found.step == 1
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path}/step-00000002: ") and "\n" not in warning and len(warning) < 600
    assert has_checkpoints(tmp_path)
    remove_unfinished(tmp_path, newest=1)
    saved(tmp_path, 2, 3, keep_last=1)
    assert newest_step(tmp_path) == 3 and not (tmp_path / "step-00000002").exists()


def test_files_that_no_manifest_names_are_not_looked_at(tmp_path: Path) -> None:
    """As some file systems leave them."""
    saved(tmp_path, 1)
    (tmp_path / "step-00000001" / ".nfs0001").write_text("left by another")
    os.mkfifo(tmp_path / "step-00000001" / "pipe")
    assert newest_step(tmp_path) == 1


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path) -> None:
    """Neither by a sweep nor when older ones go."""
    saved(tmp_path / "other", 1)
    saved(tmp_path / "run", 5)
    (tmp_path / "run" / "step-00000001").symlink_to(tmp_path / "other" / "step-00000001")
    (tmp_path / "run" / "step-00000009").symlink_to(tmp_path / "other" / "step-00000001")
    (tmp_path / "other" / "uncommitted").mkdir()
    (tmp_path / "run" / "step-00000008").symlink_to(tmp_path / "other" / "uncommitted")
    remove_unfinished(tmp_path / "run", newest=5)
    saved(tmp_path / "run", 6, keep_last=1)
    assert newest_step(tmp_path / "run") == 6 and newest_step(tmp_path / "other") == 1
    assert (tmp_path / "other" / "uncommitted").exists()
