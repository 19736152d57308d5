"""The teacher cache: what a distillation needs of the frozen part of a model, which no step ever changes.

Of each sample, the hidden states that enter layer N and the teacher's at supervised positions. With them at hand an
epoch runs no vision tower, no layer below N and no teacher, exactly: nothing is approximated. One safetensors file a
sample, named by the sample's content, in a folder named by all else that it depends on, so that any run or trial of
the same teacher and N finds it. Files are written whole or not at all, and checked as they are read; one that is not
what it should be is made anew.

Shapes: T tokens, D hidden, n supervised positions.
"""

import fcntl
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vlskv_ray.data.collate import Batch, Encoded, FrozenStates, supervised_positions
from vlskv_ray.data.images import read_image_file
from vlskv_ray.data.sample import ImageFile, Sample
from vlskv_ray.model.wrappers import ImageInputs
from vlskv_ray.words import format_bytes

FORMAT = 4
IN_MEMORY = Path(f"/dev/shm/vlskv_ray-{os.getuid()}")
"""In Linux's file system in memory, whose files every process of a machine shares. Anybody there can make a folder of
this name first, so it is looked at before it is used, see `make_private`."""
UNFINISHED = ".writing-"
"""Begins the names of files that are being written, or that a killed process left so."""
FOLDER, GROUP = re.compile(r"[0-9a-f]{16}"), re.compile(r"\w{1,2}")
"""The names of a folder of samples, and of the folders in it; nothing that is called otherwise is ever deleted."""
SAMPLE = re.compile(rf"\w+\.safetensors|{re.escape(UNFINISHED)}[\w-]+")
TOKENS, STATES = ("input_ids", "labels"), ("trunk", "teacher", "teacher_input")
"""What every sample's file holds. Between them, in the order of names, stand the `sizes` of its images; no pixels."""


def content_key(sample: Sample) -> str:
    """A name for what a sample says and shows: its messages and the bytes of its images.

    Raises:
        Rejected: an image cannot be read.
    """
    digest = hashlib.sha256(json.dumps(sample.messages, sort_keys=True).encode())
    for image in sample.images:
        data = read_image_file(image.path, image.root) if isinstance(image, ImageFile) else image
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:40]


class TeacherCache:
    """A folder of samples; small, so it travels to workers. Several processes may read and write it at once."""

    def __init__(self, root: Path, depends_on: dict[str, Any], temporary: bool = False) -> None:
        """
        Args:
            root: holds a folder for each teacher and N.
            depends_on: all that the content of a sample's file depends on beside the sample, ready for JSON.
            temporary: it goes with the last run that uses it, and nobody but this user may read it or have made it:
                where that is not so, everything below but `path` raises ValueError.
        """
        self.fingerprint = hashlib.sha256(json.dumps([FORMAT, depends_on], sort_keys=True).encode()).hexdigest()
        self.folder, self.temporary = root / self.fingerprint[:16], temporary
        self.full = False

    def _refuse_foreign(self) -> None:
        if self.temporary:
            refuse_foreign(self.folder.parent)

    def _make(self, folder: Path) -> None:
        if self.temporary:
            make_private(self.folder.parent)
        for one in (self.folder, folder):
            one.mkdir(0o700 if self.temporary else 0o777, parents=not self.temporary, exist_ok=True)

    def _open(self, path: Path, mode: str) -> IO[Any]:
        """A file of this cache, made for its user only where the cache is; never one that a link leads to."""
        permissions = 0o600 if self.temporary else 0o666
        return open(path, mode, opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, permissions))

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def count(self) -> int:
        """How many samples are there; looks at every file."""
        self._refuse_foreign()
        return sum(1 for _ in self.folder.glob("*/*.safetensors"))

    def get(self, key: str, uid: str) -> Encoded | None:
        """A sample with its states; None where there is none, or none to be trusted: then its file is taken away."""
        self._refuse_foreign()
        path = self.path(key)
        try:
            content = path.read_bytes()  # whole: a memory map would let damage come up later, as a signal
        except OSError:  # not there, or not to be read at this moment
            return None
        try:
            tensors, about = load(content), json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            if about["__metadata__"] == self._about(key, tensors):
                ids, labels = (tensors.pop(name).numpy() for name in TOKENS)
                states = FrozenStates(**{name: tensors.pop(name) for name in STATES})
                return Encoded(uid, ids, labels, images_of(tensors), key=key, states=states)
        except (SafetensorError, ValueError, KeyError):
            pass
        with suppress(OSError):
            if is_folder(self.folder) and is_folder(path.parent):
                path.unlink()
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
        images = batch.num_images.tolist()
        columns = {
            "input_ids": batch.input_ids[there].split(lengths),
            "labels": batch.labels[there].split(lengths),
            **{name: sizes.split(images) for name, sizes in batch.sizes.items()},
            "trunk": trunk.split(lengths),
            "teacher": teacher.split(counts),
            "teacher_input": teacher_input.split(counts),
        }
        for key, *tensors in zip(batch.keys, *columns.values(), strict=True):
            self.put(key, dict(zip(columns, tensors, strict=True)))

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps a sample's tensors. A disk that is full ends writing with a warning; the run goes on."""
        path = self.path(key)
        if self.full or path.exists():
            return
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        content = save(tensors, metadata=self._about(key, tensors))
        aside = path.with_name(f"{UNFINISHED}{key}-{os.getpid()}-{time.time_ns()}")
        try:
            self._make(path.parent)
            try:
                with self._open(aside, "xb") as file:
                    file.write(content)
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        except FileNotFoundError:
            pass  # another run has just cleared the folder: so this sample is made again when it comes
        except OSError as error:
            self.full = True
            print(f"warning: {path}: {error.strerror}; the teacher cache takes no more samples", file=sys.stderr)

    def _about(self, key: str, tensors: dict[str, Tensor]) -> dict[str, str]:
        checksum = 0
        for name in (*TOKENS, *sorted(tensors.keys() - {*TOKENS, *STATES}), *STATES):
            tensor = tensors[name]
            checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
            checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
        return {"sample": key, "fingerprint": self.fingerprint, "crc32": f"{checksum:08x}"}

    def check_room(self, wanted: float) -> None:
        """ValueError where `wanted` bytes more do not fit. Sweeps what killed processes have left; makes no folder."""
        self._refuse_foreign()
        for path in samples_in(self.folder):
            with suppress(OSError):  # another process may be quicker
                # nothing takes so long to write
                if path.name.startswith(UNFINISHED) and time.time() - path.lstat().st_mtime > 3600:
                    path.unlink()
        if self.temporary:
            for folder in folders_in(self.folder.parent, FOLDER):
                if folder != self.folder:  # one of this teacher may be of use still
                    self._remove_if_unused(folder)
        parent = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(parent).free
        if wanted > free:
            raise ValueError(
                f"model.teacher_cache: about {format_bytes(wanted)} are to be written to {self.folder}, where "
                f"{format_bytes(free)} are free; use teacher_cache=disk with model.teacher_cache_dir on a larger disk, "
                f"or teacher_cache=off"
            )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a run uses it. A temporary one is deleted by the last process on this machine that does, however its
        run ends; what a kill leaves is deleted at the start of the next run that has one."""
        if not self.temporary:
            yield
            return
        self._make(self.folder)
        with self._open(self.folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
                self._remove_if_unused(self.folder)

    def _remove_if_unused(self, folder: Path) -> None:
        with suppress(OSError), self._open(folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody uses it
            for path in samples_in(folder):
                path.unlink()
            for group in folders_in(folder, GROUP):
                group.rmdir()
            (folder / ".lock").unlink()
            folder.rmdir()


def images_of(sizes: dict[str, Tensor]) -> list[ImageInputs]:
    """The images of a sample without pixels. `sizes` [images, ...] each, by name."""
    columns = [tensor.numpy() for tensor in sizes.values()]
    return [ImageInputs(dict(zip(sizes, values, strict=True))) for values in zip(*columns, strict=True)]


def samples_in(folder: Path) -> Iterator[Path]:
    """The files in a folder of samples that are called as ours are; no link is followed to them."""
    if FOLDER.fullmatch(folder.name) and is_folder(folder):
        for group in folders_in(folder, GROUP):
            yield from (path for path in list(group.iterdir()) if SAMPLE.fullmatch(path.name))


def folders_in(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """The folders of these names in one that may not be there, without those that are links to elsewhere."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path for path in folder.iterdir() if names.fullmatch(path.name) and is_folder(path)]
    return []


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can enter. ValueError where something else is in its place."""
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    refuse_foreign(folder)


def refuse_foreign(folder: Path) -> None:
    """ValueError where a folder that only this user should be able to enter is anything else; it may be missing.

    Once it is this user's nobody can put another in its place, since only its owner may rename or delete what is in
    /dev/shm.
    """
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        what = f"a link to {os.readlink(folder)}"
    elif not stat.S_ISDIR(found.st_mode):
        what = "not a folder"
    elif found.st_uid != os.geteuid():
        what = f"a folder of the user {name_of(found.st_uid)}"
    elif mode & 0o077:
        what = f"a folder that other users can enter (mode {mode:o})"
    else:
        return
    raise ValueError(
        f"model.teacher_cache: memory is kept in {folder}, which is {what}; wanted a folder of {name_of(os.geteuid())} "
        f"that nobody else can enter (mode 700), since it holds the training data; remove what is there, or use "
        f"teacher_cache=disk with model.teacher_cache_dir"
    )


def name_of(user: int) -> str:
    """What a user is called, where that is known, else the number."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
