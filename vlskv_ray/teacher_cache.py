"""The teacher cache: what a distillation needs of the frozen part of a model, which no step ever changes.

Of each sample, the hidden states that enter layer N and the teacher's at supervised positions. With them at hand an
epoch runs no vision tower, no layer below N and no teacher, exactly: nothing is approximated. One safetensors file a
sample, in a folder named by all that its content depends on, so that any run or trial of the same teacher, N and data
finds it. Files are written whole or not at all, and checked as they are read; one that is not what it should be is
made anew.

Shapes: T tokens, D hidden, n supervised positions.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlskv_ray.data.collate import Batch, Encoded, FrozenStates, supervised_positions

FORMAT = 1
IN_MEMORY = Path(f"/dev/shm/vlskv_ray-{os.getuid()}")
"""In Linux's file system in memory, whose files every process of a machine shares."""


UNFINISHED = ".writing-"
"""Begins the names of files that are being written, or that a killed process left so."""
NAMES = ("input_ids", "labels", "image_sizes", "trunk", "teacher", "teacher_input")


class TeacherCache:
    """A folder of samples; small, so it travels to workers. Several processes may read and write it at once."""

    def __init__(self, root: Path, depends_on: dict[str, Any]) -> None:
        """
        Args:
            root: holds a folder for each teacher, N and set of data.
            depends_on: all that the content of a sample's file depends on, ready for JSON.
        """
        self.fingerprint = hashlib.sha256(json.dumps([FORMAT, depends_on], sort_keys=True).encode()).hexdigest()
        self.folder = root / self.fingerprint[:16]
        self.full = False

    def path(self, uid: str) -> Path:
        name = hashlib.sha256(uid.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def __contains__(self, uid: str) -> bool:
        return self.path(uid).exists()

    def get(self, uid: str) -> Encoded | None:
        """A sample with its states; None where there is none, or none to be trusted: then its file is taken away."""
        path = self.path(uid)
        try:
            content = path.read_bytes()  # whole: a memory map would let damage come up later, as a signal
            found, about = load(content), json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            tensors = {name: found[name] for name in NAMES}
            if about["__metadata__"] == self._about(uid, tensors):
                ids, labels, sizes, *states = tensors.values()
                image_sizes = [(height, width) for height, width in sizes.tolist()]
                return Encoded(uid, ids.numpy(), labels.numpy(), [], image_sizes, states=FrozenStates(*states))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError):
            pass
        path.unlink(missing_ok=True)
        return None

    def put_batch(self, batch: Batch, trunk: Tensor, teacher: Tensor, teacher_input: Tensor) -> None:
        """Keeps the samples of a batch that are not there yet.

        Args:
            batch: as it went through the model.
            trunk, teacher, teacher_input: its states, as `Batch` has them.
        """
        there = batch.attention_mask.bool()
        lengths = there.sum(1).tolist()
        counts = supervised_positions(batch.labels).sum(1).tolist()
        sizes = torch.zeros(0, 2, dtype=torch.int64) if batch.image_sizes is None else batch.image_sizes
        parts = zip(
            batch.sample_ids,
            batch.input_ids[there].split(lengths),
            batch.labels[there].split(lengths),
            sizes.split(batch.num_images.tolist()),
            trunk.split(lengths),
            teacher.split(counts),
            teacher_input.split(counts),
            strict=True,
        )
        for uid, *tensors in parts:
            self.put(uid, dict(zip(NAMES, tensors, strict=True)))

    def put(self, uid: str, tensors: dict[str, Tensor]) -> None:
        """Keeps a sample's tensors `NAMES`. A disk that is full ends writing with a warning; the run goes on."""
        path = self.path(uid)
        if self.full or path.exists():
            return
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=UNFINISHED, delete=False) as file:
                try:
                    file.write(save(tensors, metadata=self._about(uid, tensors)))
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            self.full = True
            warnings.warn(f"{path}: {error.strerror}; the teacher cache takes no more samples", stacklevel=2)

    def clear(self) -> None:
        """Deletes all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _about(self, uid: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        checksum = 0
        for name in NAMES:
            tensor = tensors[name]
            checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
        return {"sample": uid, "fingerprint": self.fingerprint, "crc32": f"{checksum:08x}"}

    def __len__(self) -> int:
        """How many samples are there."""
        return sum(1 for _ in self.folder.glob("*/*.safetensors"))

    def check_room(self, wanted: float) -> None:
        """ValueError where `wanted` bytes more do not fit, or there can be no folder. Sweeps what kills have left."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"model.teacher_cache_dir: {self.folder} cannot be made: {error.strerror}") from None
        for path in self.folder.glob(f"*/{UNFINISHED}*"):
            with suppress(OSError):  # another process may be quicker
                if time.time() - path.stat().st_mtime > 3600:  # nothing takes so long to write
                    path.unlink()
        free = shutil.disk_usage(self.folder).free
        if wanted > free:
            raise ValueError(
                f"model.teacher_cache: about {wanted / 2**30:.1f} GiB are to be written to {self.folder}, where "
                f"{free / 2**30:.1f} GiB are free; set model.teacher_cache_dir to a larger disk, or teacher_cache=off"
            )
