"""The one directory format of a run's state: written aside, verified by sha256, and real only once committed.

    checkpoints/step-00000050/
        trainable.safetensors   the weights that train
        optimizer.safetensors   their moments
        state.json              where the run stands
        manifest.json           sha256 and size of each file above
        COMMIT                  written last: sha256 of the manifest

Nothing is ever unpickled. A process may be killed at any moment: what lacks its COMMIT, or does not match its manifest,
is not a checkpoint, and the one before it is used. So it is with one that holds something else than a run writes, even
where every hash fits: its files are regular ones of these names, and its state is within what a run can have.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlskv_ray.files import flush, make_readable, reject_duplicate_keys, write_json, write_text
from vlskv_ray.training.faults import fault_point

FORMAT = 3
STATE_FILES = {"trainable.safetensors", "optimizer.safetensors", "state.json"}
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,17})")
_MAX_JSON = 64 * 2**20
"""Bytes; the state of a run has a few thousand."""

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Part = Annotated[int, Field(ge=1, le=2**24)]
_Counts = dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], _Count]


class _State(BaseModel):
    """What state.json must hold for a run to go on from it, see `saving.state_of`; more may stand there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=1)]
    micro_batches_per_step: _Part
    shares_per_step: _Part
    tokens: dict[Literal["per_image", "per_byte"], Annotated[float, Field(ge=0, le=1e9)]]
    threads: Annotated[int, Field(ge=1, le=4096)] | None
    use_gpu: bool = False
    fingerprints: dict[str, str]
    score: Annotated[float, Field(allow_inf_nan=True)] | None = None
    seen: _Count
    rejected: dict[str, _Count]
    seconds: Annotated[float, Field(ge=0)]
    lengths: _Counts
    images: _Counts
    supervised: dict[Literal["vision", "text"], _Count] = {}
    empty_steps: _Count = 0
    example: dict[Literal["id", "detail"], str] = {}
    config: dict[str, Any]

    @model_validator(mode="after")
    def _is_dealt_evenly(self) -> Self:
        if self.micro_batches_per_step % self.shares_per_step:
            raise ValueError(f"shares_per_step {self.shares_per_step} does not divide {self.micro_batches_per_step}")
        return self


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
    fault_point("save_written", step)
    if target.exists():  # left by a killed run, or damaged: had it been good, the run would have gone on from it
        shutil.rmtree(target)
    aside.rename(target)  # whole or not at all, on one file system
    flush(root)
    fault_point("save_renamed", step)
    write_text(target / "COMMIT", _sha256(target / "manifest.json"))
    flush(target)
    fault_point("save_committed", step)
    # later ones are damaged: the run was set back behind them; what a link leads to is not ours to remove
    older = sorted(s for s, path in _committed(root).items() if s <= step and not path.is_symlink())
    kept = {*older[-keep_last:], *_best(root, older, keep_best)}
    for old in older:
        if old not in kept:
            (root / f"step-{old:08d}" / "COMMIT").unlink()  # first, so that half of one never counts
            fault_point("save_removing", step)
            shutil.rmtree(root / f"step-{old:08d}")
    return target


def _write_aside(aside: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for stem, named in tensors.items():
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, aside / f"{stem}.safetensors")
        fault_point("save_tensors", step)
    write_json(aside / "state.json", {"format": FORMAT, "step": step, **state})
    make_readable(*aside.iterdir())
    manifest = {path.name: {"sha256": _sha256(path), "bytes": _size(path)} for path in sorted(aside.iterdir())}
    write_json(aside / "manifest.json", manifest)
    for path in (*aside.iterdir(), aside):
        flush(path)


def _best(root: Path, steps: Sequence[int], count: int) -> list[int]:
    """Of these checkpoints the ones with the lowest scores."""
    scores = {}
    for step in steps if count else ():
        with suppress(OSError, DamagedCheckpoint):
            score = _json(root / f"step-{step:08d}" / "state.json").get("score")
            if isinstance(score, float) and math.isfinite(score):
                scores[step] = score
    return sorted(scores, key=lambda step: scores[step])[:count]


def newest_checkpoint(root: Path, warn: Callable[[str], None]) -> SavedState | None:
    """The newest checkpoint that verifies, found by looking; `warn` is told of every damaged one passed over."""
    for _, path in sorted(_committed(root).items(), reverse=True):
        try:
            return verified_checkpoint(path)
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
        DamagedCheckpoint: a file is missing, is not what the manifest says, or is of another format; or it is what no
            run writes.
    """
    if path.is_symlink():
        raise DamagedCheckpoint(f"{path}: is a link; wanted the folder itself")
    try:
        state = _verified_state(path)
        for name in STATE_FILES - {"state.json"}:
            with safe_open(path / name, "pt"):  # which reads what it says of its tensors
                pass
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path}: {name} cannot be read ({error})") from error
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: {Path(error.filename or path).name} cannot be read ({error.strerror})"
        ) from error
    return SavedState(step=state["step"], path=path, state=state)


def _verified_state(path: Path) -> dict[str, Any]:
    """What state.json holds, where all files are what the manifest says and a run could have written them."""
    if _read(path / "COMMIT") != _sha256(path / "manifest.json").encode():
        raise DamagedCheckpoint(f"{path}: manifest.json is not the one that was committed")
    manifest = _json(path / "manifest.json")
    if manifest.keys() != STATE_FILES:
        wrong = ", ".join(map(repr, sorted(STATE_FILES ^ manifest.keys())))
        raise DamagedCheckpoint(f"{path}: manifest.json lacks, or names beside a checkpoint's files: {wrong}")
    for name in sorted(STATE_FILES):
        entry = manifest[name] if isinstance(manifest[name], dict) else {}
        if _size(path / name) != entry.get("bytes") or _sha256(path / name) != entry.get("sha256"):
            raise DamagedCheckpoint(f"{path}: {name} is damaged (its size or sha256 is not the manifest's)")
    state = _json(path / "state.json")
    if state.get("format") != FORMAT:
        raise DamagedCheckpoint(f"{path}: is of format {state.get('format')!r}, this version reads {FORMAT}")
    _check_state(path, state)
    return state


def _check_state(path: Path, state: dict[str, Any]) -> None:
    """DamagedCheckpoint where a state is not one that a run could be in."""
    try:
        step = _State.model_validate(state).step
    except ValidationError as error:
        first = error.errors()[0]
        key, got = ".".join(map(str, first["loc"])), repr(first["input"])[:80]
        told = f"{key}: {first['msg']}, got {got}" if key else first["msg"]
        raise DamagedCheckpoint(f"{path}: state.json holds what no run writes ({told})") from error
    if path.name != f"step-{step:08d}":
        raise DamagedCheckpoint(f"{path}: state.json is of step {step}")


def has_checkpoints(root: Path) -> bool:
    """Whether any was ever committed here, valid or not."""
    return bool(_committed(root))


def remove_unfinished(root: Path, newest: int) -> None:
    """Removes what killed runs left half-written, and renames the damaged ones after `newest`, where a run goes on."""
    for path in root.glob("*step-*"):
        name = _NAME.fullmatch(path.name.removeprefix(".writing-"))
        if not (path.is_dir() and name):
            continue
        if not path.is_symlink() and not os.path.lexists(path / "COMMIT"):
            shutil.rmtree(path)
        elif int(name[1]) > newest:
            path.rename(path.with_name(f"damaged-{time.time_ns()}-{path.name}"))


def _committed(root: Path) -> dict[int, Path]:
    """The folders of checkpoints by their step, valid or not, and links to such."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in root.glob("step-*"))
    return {int(match[1]): path for path, match in matches if match and os.path.lexists(path / "COMMIT")}


def _size(path: Path) -> int:
    """The bytes of a file. OSError where it leads elsewhere, as a link does, or would be waited for, as a pipe."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return found.st_size


def _read(path: Path) -> bytes:
    if _size(path) > _MAX_JSON:
        raise OSError(errno.EFBIG, f"it has more than {_MAX_JSON} bytes", str(path))
    return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    """An object whose keys are given once; DamagedCheckpoint for anything else."""
    content = _read(path)
    try:
        value = json.loads(content, object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.parent}: {path.name} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path.parent}: {path.name} cannot be read (it holds no object)")
    return value


def _sha256(path: Path) -> str:
    _size(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
