"""The one directory format of a run's state: written aside, verified by sha256, and real only once committed.

    checkpoints/step-00000050/
        trainable.safetensors   the weights that train
        optimizer.safetensors   their moments
        state.json              where the run stands
        manifest.json           sha256 and size of each file above
        COMMIT                  written last: sha256 of the manifest

Nothing is ever unpickled. A process may be killed at any moment: what lacks its COMMIT, or does not match its manifest,
is not a checkpoint, and the one before it is used.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlskv_ray.faults import point

FORMAT = 3
STATE_FILES = {"trainable.safetensors", "optimizer.safetensors", "state.json"}
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class SavedState:
    """A verified checkpoint: `step` optimizer steps have been made."""

    step: int
    path: Path
    state: dict[str, Any]

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of one of its files."""
        return {name: tensor.clone() for name, tensor in load_file(self.path / f"{stem}.safetensors").items()}


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says, with what is wrong with it."""


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep_last: int,
    keep_best: int = 0,
) -> Path:
    """Writes and commits the checkpoint of `step`, then removes those that need not be kept.

    Args:
        root: the run's `checkpoints` folder, on storage that every worker shares.
        tensors: of each file, by its stem.
        state: JSON values; `score`, if it has one, says how good it is: the lower, the better.
        keep_last: newest ones to keep, this one included.
        keep_best: ones of the lowest scores to keep beside them.

    Raises:
        OSError: the storage did not take it; what was there before is untouched.
    """
    target = root / f"step-{step:08d}"
    aside = root / f".writing-step-{step:08d}"
    try:
        _write_aside(aside, step, tensors, state)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # so that a full disk has the room again
        raise error if isinstance(error, OSError) else OSError(f"{aside}: cannot be written ({error})") from error
    point("save_written", step)
    if target.exists():  # left by a killed run, or damaged: had it been good, the run would have gone on from it
        shutil.rmtree(target)
    aside.rename(target)
    _flush(root)
    point("save_renamed", step)
    write_text(target / "COMMIT", _sha256(target / "manifest.json"))
    _flush(target)
    point("save_committed", step)
    older = sorted(s for s in _committed(root) if s <= step)  # later ones are damaged: the run was set back behind them
    kept = {*older[-keep_last:], *_best(root, older, keep_best)}
    for old in older:
        if old not in kept:
            (root / f"step-{old:08d}" / "COMMIT").unlink()  # first, so that half of one never counts
            point("save_removing", step)
            shutil.rmtree(root / f"step-{old:08d}")
    return target


def _write_aside(aside: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for stem, named in tensors.items():
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, aside / f"{stem}.safetensors")
        point("save_tensors", step)
    write_json(aside / "state.json", {"format": FORMAT, "step": step, **state})
    share(aside)
    manifest = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in sorted(aside.iterdir())}
    write_json(aside / "manifest.json", manifest)
    for path in (*aside.iterdir(), aside):
        _flush(path)


def _best(root: Path, steps: Sequence[int], count: int) -> list[int]:
    """Of these checkpoints the ones with the lowest scores."""
    scores = {}
    for step in steps if count else ():
        with suppress(OSError, ValueError):
            score = json.loads((root / f"step-{step:08d}" / "state.json").read_bytes()).get("score")
            if isinstance(score, float) and math.isfinite(score):
                scores[step] = score
    return sorted(scores, key=lambda step: scores[step])[:count]


def newest_checkpoint(root: Path, warn: Callable[[str], None]) -> SavedState | None:
    """The newest checkpoint that verifies, found by looking; `warn` is told of every damaged one passed over."""
    for step in sorted(_committed(root), reverse=True):
        try:
            return verified_checkpoint(root / f"step-{step:08d}")
        except DamagedCheckpoint as error:
            warn(f"{error}; looking for one before it")
    return None


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 if there is none."""
    found = newest_checkpoint(root, warn=lambda _: None)
    return found.step if found else 0


def verified_checkpoint(path: Path) -> SavedState:
    """One checkpoint, every byte of it checked.

    Raises:
        DamagedCheckpoint: a file is missing, is not what the manifest says, or is of another format.
    """
    try:
        if (path / "COMMIT").read_text() != _sha256(path / "manifest.json"):
            raise DamagedCheckpoint(f"{path}: manifest.json is not the one that was committed")
        manifest: dict[str, dict[str, Any]] = json.loads((path / "manifest.json").read_bytes())
        for name, entry in manifest.items():
            if _sha256(path / name) != entry["sha256"]:
                raise DamagedCheckpoint(f"{path}: {name} is damaged (its sha256 is not the manifest's)")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from error
    if not manifest.keys() >= STATE_FILES:
        raise DamagedCheckpoint(f"{path}: lacks {', '.join(sorted(STATE_FILES - manifest.keys()))}")
    state = json.loads((path / "state.json").read_bytes())
    if state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: is of format {state.get('format')}, this version reads {FORMAT}")
    return SavedState(step=state["step"], path=path, state=state)


def has_checkpoints(root: Path) -> bool:
    """Whether any was ever committed here, valid or not."""
    return bool(_committed(root))


def sweep(root: Path, newest: int) -> None:
    """Removes what killed runs left half-written, and renames the damaged ones after `newest`, where a run goes on."""
    for path in root.glob("*step-*"):
        name = _NAME.fullmatch(path.name.removeprefix(".writing-"))
        if path.is_dir() and name and not (path / "COMMIT").exists():
            shutil.rmtree(path)
        elif path.is_dir() and name and int(name[1]) > newest:
            path.rename(path.with_name(f"damaged-{time.time_ns()}-{path.name}"))


def share(folder: Path) -> None:
    """Gives files the permissions that others have: safetensors writes weights for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        aside.write_text(text, encoding="utf-8", newline="")
        _flush(aside)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error


def _committed(root: Path) -> list[int]:
    matches = ((path, _NAME.fullmatch(path.name)) for path in root.glob("step-*"))
    return [int(match[1]) for path, match in matches if match and (path / "COMMIT").is_file()]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
