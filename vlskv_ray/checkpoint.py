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
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class SavedState:
    """A verified checkpoint: `step` optimizer steps have been made."""

    step: int
    path: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what its manifest says, with what is wrong with it."""


def save_checkpoint(
    root: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep_last: int
) -> Path:
    """Writes and commits the checkpoint of `step`, then removes all but the newest `keep_last` committed ones.

    Args:
        root: the run's `checkpoints` folder, on storage that every worker shares.
        tensors: of each file, by its stem.
        state: JSON values.

    Raises:
        OSError: the storage did not take it; what was there before is untouched.
    """
    target = root / f"step-{step:08d}"
    aside = root / f".writing-step-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    files = {f"{stem}.safetensors": save(_contiguous(named)) for stem, named in tensors.items()}
    files["state.json"] = json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode()
    manifest = {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()}
    files["manifest.json"] = json.dumps(manifest, indent=1).encode()
    for name, data in files.items():
        _write(aside / name, data)
    _flush_folder(aside)
    if target.exists():  # left over by a killed run, or of a run that was set back: never a committed one of this run
        shutil.rmtree(target)
    aside.rename(target)
    _flush_folder(root)
    _write(target / "COMMIT", _sha256(files["manifest.json"]).encode())
    _flush_folder(target)
    for old in sorted(_committed(root))[:-keep_last]:
        shutil.rmtree(root / f"step-{old:08d}")
    return target


def newest_checkpoint(root: Path, warn: Callable[[str], None]) -> SavedState | None:
    """The newest checkpoint that verifies, found by looking; `warn` is told of every damaged one passed over."""
    for step in sorted(_committed(root), reverse=True):
        try:
            return load_checkpoint(root / f"step-{step:08d}")
        except DamagedCheckpoint as error:
            warn(f"{error}; using the one before it")
    return None


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 if there is none."""
    found = newest_checkpoint(root, warn=lambda _: None)
    return found.step if found else 0


def load_checkpoint(path: Path) -> SavedState:
    """Reads and verifies one checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing, is not what the manifest says, or is of another format.
    """
    try:
        listing = (path / "manifest.json").read_bytes()
        if (path / "COMMIT").read_text() != _sha256(listing):
            raise DamagedCheckpoint(f"{path}: manifest.json is not the one that was committed")
        manifest: dict[str, dict[str, Any]] = json.loads(listing)
        files = {name: (path / name).read_bytes() for name in manifest}
    except (OSError, ValueError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{path}: cannot be read ({error})") from error
    for name, data in files.items():
        if _sha256(data) != manifest[name]["sha256"]:
            raise DamagedCheckpoint(f"{path}: {name} is damaged (its sha256 is not the manifest's)")
    state = json.loads(files["state.json"])
    if state["format"] != FORMAT:
        raise DamagedCheckpoint(f"{path}: is of format {state['format']}, this version reads {FORMAT}")
    tensors = {name.removesuffix(".safetensors"): load(files[name]) for name in files if name.endswith(".safetensors")}
    return SavedState(step=state["step"], path=path, state=state, tensors=tensors)


def sweep(root: Path) -> None:
    """Removes what killed runs left half-written."""
    for path in root.glob(".writing-step-*"):
        shutil.rmtree(path)
    for path in root.glob("step-*"):
        if _NAME.fullmatch(path.name) and not (path / "COMMIT").exists():
            shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a small text file whole or not at all."""
    aside = path.with_name(f".writing-{path.name}")
    _write(aside, text.encode())
    aside.replace(path)


def _committed(root: Path) -> list[int]:
    matches = ((path, _NAME.fullmatch(path.name)) for path in root.glob("step-*"))
    return [int(match[1]) for path, match in matches if match and (path / "COMMIT").is_file()]


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
