"""The teacher cache: exact, found again by what its content depends on, and never trusted blindly."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch_of, conversation, picture
from safetensors.torch import load, load_file
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.config import Config
from vlskv_ray.data import teacher_cache
from vlskv_ray.data.collate import Batch, Encoded, from_row, to_row
from vlskv_ray.data.sample import ImageFile, Sample
from vlskv_ray.data.teacher_cache import TeacherCache, content_key
from vlskv_ray.launch.driver import train
from vlskv_ray.model.build import trainable_parameters
from vlskv_ray.model.swiftkv import BACKBONES, swiftkv_backbone
from vlskv_ray.training.distill import DistillationLoss, cached_pass, distillation_loss, shared_pass

OBJECTIVE = DistillationLoss(temperature=2.0, hidden_loss_weight=0.5)


@pytest.fixture
def encoded(encoded: list[Encoded]) -> list[Encoded]:
    return [replace(sample, key=sample.uid) for sample in encoded]


@pytest.fixture
def cache(tmp_path: Path) -> TeacherCache:
    return TeacherCache(tmp_path / "cache", {"model": "tiny", "num_key_value_layers": 2})


def fill(cache: TeacherCache, model: Any, batch: Batch) -> None:
    with torch.no_grad():
        states = shared_pass(model, batch)
    cache.put_batch(batch, states.trunk, states.teacher, states.teacher_input)


def cached(cache: TeacherCache, keys: list[str]) -> list[Encoded]:
    return [sample for key in keys if (sample := cache.get(key, key)) is not None]


def gradient(model: Any, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss, sums = distillation_loss(model, batch, OBJECTIVE)
    assert loss is not None
    loss.backward()
    return sums.loss, torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("group", [1, 2])
def test_loss_and_gradients_are_those_without_it(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache, backbone: str, group: int
) -> None:
    """Bit for bit in the batch that was cached, to 1e-6 in others, with images and without, as bytes from elsewhere."""
    model = student(backbone, key_value_group_size=group)
    fill(cache, model, batch_of(encoded))
    for chosen, exactly in ((encoded, True), (encoded[5:1:-1], False), (encoded[1:2], False)):
        plain = batch_of(chosen)
        known = from_row(to_row(batch_of(cached(cache, plain.sample_ids))))
        assert not known.pixels and torch.equal(known.has_image, plain.has_image)
        assert torch.equal(known.input_ids, plain.input_ids) and torch.equal(known.labels, plain.labels)
        (loss, got), (wanted_loss, wanted) = gradient(model, known), gradient(model, plain)
        if exactly:
            assert loss == wanted_loss and torch.equal(got, wanted)
        else:
            assert loss == pytest.approx(wanted_loss, rel=1e-6) and (got - wanted).norm() < 1e-6 * wanted.norm()


def test_only_the_student_runs(student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache) -> None:
    """Counted: no tower, no layer below N, and in those above only supervised positions."""
    model = student()
    batch = batch_of(encoded)
    fill(cache, model, batch)
    known, rows = batch_of(cached(cache, batch.sample_ids)), dict[str, list[int]]()

    def count(name: str) -> Callable[..., None]:
        return lambda module, args, output: rows.setdefault(name, []).append(args[0].shape[:-1].numel())

    layers = swiftkv_backbone(model).layers
    hooks = [model.model.vision_tower.register_forward_hook(count("tower"))]
    hooks += [layer.mlp.register_forward_hook(count(f"mlp{i}")) for i, layer in enumerate(layers)]
    cached_pass(model, known)
    for hook in hooks:
        hook.remove()
    kept = int((known.labels[:, 1:] >= 0).sum())
    assert rows == {f"mlp{i}": [kept] for i in range(2, 6)}


def test_a_file_holds_tokens_sizes_and_states(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache
) -> None:
    """By these names, no pixels; one without images may hold sizes of none, as it does beside samples with some."""
    fill(cache, student(), batch_of(encoded[1:3]))
    fill(cache, student(), batch_of(encoded[3:4]))
    names = {"input_ids", "labels", "trunk", "teacher", "teacher_input"}
    for key, images in (("b", []), ("c", encoded[2].images), ("d", [])):
        held = load(cache.path(key).read_bytes())
        assert held.keys() - {"image_sizes"} == names and ("image_sizes" in held) == (key != "d")
        sample = cache.get(key, key)
        assert sample is not None and not any(image.pixels for image in sample.images)
        sizes = [image.sizes["image_sizes"].tolist() for image in sample.images]
        assert sizes == [image.sizes["image_sizes"].tolist() for image in images]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x80\x04" + b"x" * 500),
}


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache, damage: str
) -> None:
    model, batch = student(), batch_of(encoded[:2])
    fill(cache, model, batch)
    path = cache.path("a")
    whole = load(path.read_bytes())
    DAMAGES[damage](path)
    assert cache.get("a", "a") is None and not path.exists() and cache.get("b", "b") is not None
    fill(cache, model, batch)
    again = load(path.read_bytes())
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_foreign_file_is_not_used(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache, tmp_path: Path
) -> None:
    """That of another sample, or of another teacher, under the right name."""
    fill(cache, student(), batch_of(encoded[:2]))
    other = TeacherCache(tmp_path / "cache", {"model": "tiny", "num_key_value_layers": 3})
    assert other.folder != cache.folder and other.get("a", "a") is None
    other.path("a").parent.mkdir(parents=True)
    shutil.copy(cache.path("a"), other.path("a"))
    shutil.copy(cache.path("b"), cache.path("a"))
    assert other.get("a", "a") is None and cache.get("a", "a") is None
    assert cache.count() == 1 and other.count() == 0


def test_what_a_kill_has_left_is_no_sample(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache
) -> None:
    """And is swept once nobody can be writing it any more."""
    fill(cache, student(), batch_of(encoded[:2]))
    old, new = (cache.path("a").with_name(f"{teacher_cache.UNFINISHED}{name}") for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    cache.check_room(0)
    assert cache.count() == 2 and not old.exists() and new.exists()


def test_a_full_disk_ends_writing_and_not_the_run(
    student: Callable[..., Any],
    encoded: list[Encoded],
    cache: TeacherCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """With a warning, and without half a file; a size that cannot fit is refused before anything is written."""
    model = student()

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_room)
    fill(cache, model, batch_of(encoded[:2]))
    assert "No space left on device; the teacher cache takes no more samples" in capsys.readouterr().err
    assert cache.count() == 0 and cache.full and not list(cache.folder.glob("*/*"))
    with pytest.raises(ValueError, match=r"about 1024.00 GiB are to be written .* teacher_cache=off"):
        cache.check_room(2**50 / 1024)


def test_what_cannot_be_read_now_is_kept(
    student: Callable[..., Any], encoded: list[Encoded], cache: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the storage says nothing about the file."""
    fill(cache, student(), batch_of(encoded[:2]))

    def fails(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        assert cache.get("a", "a") is None
    assert cache.get("a", "a") is not None
    umask = os.umask(0)
    os.umask(umask)
    assert cache.path("a").stat().st_mode & 0o777 == 0o666 & ~umask  # whoever may read the folder may read them


def test_a_temporary_one_goes_with_its_last_user(tmp_path: Path) -> None:
    """Whatever ends a run; what a kill leaves goes when another run starts."""
    left, cache = (TeacherCache(tmp_path, {"model": name}, temporary=True) for name in ("left", "mine"))
    left.path("x").parent.mkdir(parents=True)
    left.path("x").write_bytes(b"x")
    left.path("x").with_name(f"{teacher_cache.UNFINISHED}x-1-1").write_bytes(b"x")
    with cache.in_use():
        with pytest.raises(ZeroDivisionError), cache.in_use():
            raise ZeroDivisionError
        assert cache.folder.exists()
        left.check_room(0)
        assert cache.folder.exists() and left.folder.exists()
        cache.check_room(0)
        assert not left.folder.exists()
    assert not cache.folder.exists()


# ------------------------------------------------------------------------------------- a place that anybody can foresee
def home_like(folder: Path) -> dict[Path, bytes]:
    """A folder with what a cache must never touch, however much of it is called as a cache's is; its content."""
    for name in ("letter.txt", ".config/x", "0123456789abcdef/ab/notes.txt", "0123456789abcdef/model/a.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return content_of(folder)


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def link(root: Path, home: Path) -> None:
    root.symlink_to(home)


def make_open(root: Path, home: Path) -> None:
    root.mkdir()
    root.chmod(0o777)


def make_readable(root: Path, home: Path) -> None:
    root.mkdir()
    root.chmod(0o755)


def make_file(root: Path, home: Path) -> None:
    root.write_text("")


FOREIGN = {
    "a link to ": link,
    "a folder that other users can enter (mode 777)": make_open,
    "a folder that other users can enter (mode 755)": make_readable,
    "not a folder": make_file,
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_place_in_memory_that_is_not_ours_alone_is_refused(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path, what: str
) -> None:
    """By everything that would read, write or clear it, and nothing of what is there is touched."""
    home, root = tmp_path / "home", tmp_path / "shm"
    before = home_like(home)
    FOREIGN[what](root, home)
    cache = TeacherCache(root, {"model": "tiny"}, temporary=True)
    model, batch = student(), batch_of(encoded[:1])
    told = f"model.teacher_cache: memory is kept in {root}, which is {what}"
    uses: list[Callable[[], object]] = [
        cache.count,
        lambda: cache.check_room(0),
        lambda: cache.get("a", "a"),
        lambda: fill(cache, model, batch),
        lambda: cache.in_use().__enter__(),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=re.escape(told) + ".*; remove what is there, or use teacher_cache=disk "):
            use()
    assert content_of(home) == before
    assert root.is_file() or not {path.name for path in root.iterdir()} - {path.name for path in home.iterdir()}


def test_only_its_user_can_read_what_is_kept_in_memory(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path
) -> None:
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        cache = TeacherCache(tmp_path / "shm", {"model": "tiny"}, temporary=True)
        with cache.in_use():
            fill(cache, student(), batch_of(encoded[:2]))
            assert cache.count() == 2
            modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "shm").rglob("*") if path.is_file()}
            folders = {path.stat().st_mode & 0o777 for path in (tmp_path / "shm").rglob("*") if path.is_dir()}
            assert (modes, folders) == ({0o600}, {0o700}) and (tmp_path / "shm").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_what_a_cache_has_not_made_is_never_deleted(
    student: Callable[..., Any], encoded: list[Encoded], tmp_path: Path
) -> None:
    """Neither what lies in its folders nor what a link in them leads to, in memory and on disk."""
    home, root = tmp_path / "home", tmp_path / "shm"
    before = home_like(home)
    root.mkdir(0o700)
    left, cache = (TeacherCache(root, {"model": name}, temporary=True) for name in ("left", "mine"))
    (root / "fedcba9876543210").symlink_to(home / "0123456789abcdef")
    (root / "letters").symlink_to(home)
    with cache.in_use():
        left.path("b").parent.mkdir(parents=True)
        left.path("b").write_bytes(b"x")
        (left.folder / "ab").symlink_to(home / "0123456789abcdef" / "model")
        (left.folder / "notes.txt").write_text("mine")
        cache.check_room(0)
        assert not left.path("b").exists() and (left.folder / "notes.txt").read_text() == "mine"
    assert content_of(home) == before and not cache.folder.exists()

    disk = TeacherCache(tmp_path / "disk", {"model": "tiny"})
    fill(disk, student(), batch_of(encoded[:2]))
    (disk.folder / "a").rename(tmp_path / "elsewhere")
    (disk.folder / "a").symlink_to(tmp_path / "elsewhere")
    old = tmp_path / "elsewhere" / f"{teacher_cache.UNFINISHED}a-1-1"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    assert disk.get("a", "a") is not None  # a folder that was moved to another disk serves
    DAMAGES["cut short"](disk.path("a"))
    assert disk.get("a", "a") is None
    disk.check_room(0)
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"a.safetensors", old.name}


OF_TWO_USERS = """
mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 1
as_user() { setpriv --reuid $1 --regid $1 --clear-groups --inh-caps=$CAPS --ambient-caps=$CAPS "${@:2}"; }
theirs=/dev/shm/vlskv_ray-54322/0123456789abcdef
CAPS=-all as_user 54321 sh -c "umask 0; mkdir -p $theirs && echo x > $theirs/left"
CAPS=-all,+dac_read_search as_user 54322 "$@"  # may read wherever Python and this checkout lie, and write no more
echo $?
find /dev/shm -mindepth 1 | sort
"""


def may_be_two_users() -> bool:
    capabilities = "--inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    try_it = f"mount -t tmpfs tmpfs /mnt && setpriv --reuid 54322 --clear-groups {capabilities} true"
    found = shutil.which("unshare") and shutil.which("setpriv")
    return (
        bool(found) and subprocess.run(["unshare", "--mount", "sh", "-c", try_it], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_be_two_users(), reason="making a mount namespace and being two users is not permitted")
def test_what_another_user_has_made_in_our_place_is_refused() -> None:
    """With two real users and a /dev/shm of their own: the run ends before it has read or written anything there."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own can be entered by one user only
    try:
        folder.chmod(0o777)
        options = {
            "model": {"name_or_path": "shapes-teacher", "teacher_cache": "memory"},
            "cluster": {"num_workers": 0},
        }
        options |= {"data": {"sources": [{"name": "shapes", "num_samples": 20}]}, "output": {"dir": str(folder)}}
        (folder / "run.yaml").write_text(json.dumps(options))
        train = [sys.executable, "-m", "vlskv_ray.train", "--config", str(folder / "run.yaml")]
        environment = os.environ | {"HOME": "/", "PYTHONPATH": str(Path(vlskv_ray.__file__).parents[1])}
        found = subprocess.run(
            ["unshare", "--mount", "bash", "-c", OF_TWO_USERS, "bash", *train],
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=environment,
        )
    finally:
        shutil.rmtree(folder)
    shm = "/dev/shm/vlskv_ray-54322"
    told = (
        f"model.teacher_cache: memory is kept in {shm}, which is a folder of the user 54321; wanted a folder of 54322 "
    )
    assert found.stderr.splitlines()[-1].startswith(told), found
    assert found.stdout.endswith(f"\n2\n{shm}\n{shm}/0123456789abcdef\n{shm}/0123456789abcdef/left\n"), found


def test_what_a_sample_says_and_shows_is_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(20, 20, 1))
    messages = conversation("what is it?", "a cat", images=1)
    one = content_key(Sample("x", messages, [ImageFile("a.png", tmp_path)]))
    assert one == content_key(Sample("y", messages, [picture(20, 20, 1)]))
    assert one != content_key(Sample("x", conversation("what is it?", "a dog", images=1), [picture(20, 20, 1)]))
    (tmp_path / "a.png").write_bytes(picture(20, 20, 2))
    assert one != content_key(Sample("x", messages, [ImageFile("a.png", tmp_path)]))


# ----------------------------------------------------------------------------------------------------------- whole runs
def config_of(folder: Path, teacher: Path, name: str, **model: Any) -> Config:
    return Config.model_validate(
        {
            "epochs": 3,
            "micro_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "model": {"name_or_path": str(teacher), "num_key_value_layers": 2} | model,
            "data": {"sources": [{"name": "shapes", "num_samples": 20}]},
            "optimizer": {"lr": 1e-2},
            "cluster": {"num_workers": 0, "threads_per_worker": 1},
            "output": {"dir": str(folder), "name": name, "level": "error"},
        }
    )


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("vlskv_ray.launch.cache_room.IN_MEMORY", tmp_path / "shm")
    yield tmp_path / "shm"


def test_runs_end_with_the_same_weights(
    teacher_folder: Callable[..., Path], tmp_path: Path, in_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache, with one in memory, on disk, and from one on disk that an earlier run has filled, which one that
    goes on from an earlier student finds too."""
    towers: list[str] = []
    from transformers import CLIPVisionModel

    forward = CLIPVisionModel.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        towers.append(name)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", counted)
    weights = {}
    for name, cache in (("none", "off"), ("memory", "memory"), ("disk", "disk"), ("again", "disk")):
        # copied: a fit runs the teacher too, and is kept beside the states
        assert train(config_of(tmp_path, teacher_folder(), name, teacher_cache=cache, start="copy")) == 0
        weights[name] = load_file(tmp_path / name / "final" / "model.safetensors")
    assert len(list((tmp_path / ".teacher-cache").rglob("*.safetensors"))) == 20
    assert not list(in_memory.rglob("*.safetensors"))  # memory is given back
    for name in ("memory", "disk", "again"):
        for key, weight in weights["none"].items():
            assert torch.allclose(weights[name][key], weight, rtol=1e-4, atol=1e-6), (name, key)
    assert all(torch.equal(weights["memory"][key], weights["disk"][key]) for key in weights["none"])
    assert towers.count("memory") == towers.count("disk") == towers.count("none") / 3
    name = "further"
    assert train(config_of(tmp_path, tmp_path / "disk" / "final", name, teacher_cache="disk")) == 0
    assert not {"again", "further"} & {*towers}
    further = load_file(tmp_path / name / "final" / "model.safetensors")
    assert not all(torch.equal(weight, weights["disk"][key]) for key, weight in further.items())


def test_what_does_not_fit_is_refused_before_the_run(teacher_folder: Callable[..., Path], tmp_path: Path) -> None:
    config = config_of(tmp_path, teacher_folder(), "run", teacher_cache="disk")
    source = config.data.sources[0].model_copy(update={"num_samples": 10**6})
    large = config.data.model_copy(update={"sources": [source]})
    free = shutil.disk_usage(tmp_path).free
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, free, 2**20))
        with pytest.raises(ValueError, match=r"model.teacher_cache: about [\d.]+ GiB are to be written"):
            train(config.model_copy(update={"data": large}))
    assert not (tmp_path / "run").exists() and not (tmp_path / ".teacher-cache").exists()
    with pytest.raises(ValueError, match="teacher_cache: there is no teacher with objective=sft"):
        Config.model_validate(config.model_dump() | {"objective": "sft"})
