"""Inputs that failed elsewhere, each with the outcome that is right, in this process and through Ray's data graph.

The files are in tests/cases, made after public reports, but for pictures and texts that are large, which are made here.
The model's chat template is the one that public copies of llava-v1.6-mistral carry, which writes only the first part of
some turns.
"""

import json
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from templates import HUB_MISTRAL
from waiting import HANG_SECONDS

from vlskv_ray.config import SourceConfig
from vlskv_ray.data import layouts
from vlskv_ray.data.chat import Limits
from vlskv_ray.data.collate import IGNORE_INDEX, Batch
from vlskv_ray.data.labels import check_template
from vlskv_ray.data.pipeline import Loader, begin_at, local_batches, ray_batches, ray_dataset
from vlskv_ray.data.plan import Plan, Table, Tokens
from vlskv_ray.data.sample import SourceError
from vlskv_ray.data.sources import Source, open_sources
from vlskv_ray.model.build import find_model
from vlskv_ray.model.processor import load_processor

CASES = Path(__file__).parent.parent / "cases"

TEXT, ONE_IMAGE = "0 images", "1 images"

ROWS: dict[str, list[tuple[str, str]]] = {
    "c01_jpg_row_gif_file.jsonl": [
        (TEXT, ""),
        (TEXT, ""),
        ("image_missing", "'b1.gif' is there, with another suffix"),
        (TEXT, ""),
        (TEXT, ""),
    ],
    "c02_placeholder_image_none.jsonl": [("image_null", "")] * 4,
    "c04_image_string_vs_list.jsonl": [(ONE_IMAGE, "")] * 3,
    "c05_honest_big_png_metadata.jsonl": [(ONE_IMAGE, "")] * 3,
    "c06_role_orders.jsonl": [
        ("role_order", "assistant, user, assistant; wanted"),
        ("role_order", "user, user, assistant; wanted"),
        ("role_order", "user, assistant, assistant; wanted"),
        ("role_order", "user, assistant, user; wanted"),
        ("role_order", "user, system, assistant; wanted"),
        ("role_order", "system, system, user, assistant; wanted"),
        (TEXT, ""),
    ],
    "c08_parts_lost_by_template.jsonl": [(TEXT, ""), (TEXT, ""), ("2 images", ""), (ONE_IMAGE, "")],
    "c14_long_text.jsonl": [("text_cap", "1000004 characters of text"), (TEXT, "")],
    "c07_glob/*.parquet": [(TEXT, "")] * 3 + [(ONE_IMAGE, "")] * 3,
    "c07b_glob/*.parquet": [(TEXT, "")] * 3 + [(ONE_IMAGE, "")] * 3,
    "c07c_glob/*.parquet": [(TEXT, "")] * 6,
    "prompts.jsonl": [(TEXT, ""), (ONE_IMAGE, ""), ("content_type", "the column 'answer' is null; wanted text")],
}
"""Of each row of a source, what becomes of it, and what is said to that."""

FILES = {
    "c03_image_in_part_or_other_column.jsonl": r"jsonl:2: 'imgs', 'image_path' \(.*:3\), 'image_file' \(.*:4\) look",
    "c15_root_dict_indented.json": r"'info', 'questions' \(list of 1\), 'license'; .*save the list under 'questions'",
}
"""Sources that are refused whole, and why."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cases, with PNGs that hold more than 1 MiB of a colour profile, or of XMP before or after the pixels; and
    rows in a layout that this process alone knows, so that it must travel with them."""
    folder = tmp_path_factory.mktemp("cases") / "cases"
    shutil.copytree(CASES, folder)
    png = (folder / "root" / "g.png").read_bytes()
    large = zlib.compress(np.random.default_rng(0).bytes(2**20 + 2**19))
    xmp, profile = b"XML:com.adobe.xmp\0\1\0\0\0" + large, b"profile\0\0" + large
    chunks = {"icc": (b"iCCP", profile, 33), "xmp": (b"iTXt", xmp, 33), "xmp_after": (b"iTXt", xmp, len(png) - 12)}
    for name, (kind, content, at) in chunks.items():  # behind the header, or before the end
        chunk = len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)
        (folder / "root" / f"{name}.png").write_bytes(png[:at] + chunk + png[at:])
    rows = [
        [{"role": "user", "content": "Say."}, {"role": "assistant", "content": text}] for text in ("x" * 10**6, "Hi.")
    ]
    (folder / "c14_long_text.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    prompts = [("Say.", "Hi.", None), ("What?", "A cat.", "g.png"), ("Say.", None, None)]
    columns = ("prompt", "answer", "image")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(dict(zip(columns, values, strict=True))) + "\n" for values in prompts)
    )
    roles = {"prompt": "user", "answer": "assistant"}
    layouts.register(
        layouts.Layout(
            "prompts",
            dict.fromkeys(roles, layouts.TEXT),
            lambda row: [{"role": role, "content": row[column]} for column, role in roles.items()],
        )
    )
    yield folder
    del layouts.LAYOUTS["prompts"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("model") / "of-the-hub"
    shutil.copytree(teacher_folder(), folder)
    (folder / "chat_template.jinja").write_text(HUB_MISTRAL)
    return folder


def spec(cases: Path, name: str, **options: int) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(cases / name), "image_root": str(cases / "root"), **options})


def loader_of(cases: Path, names: Iterable[str], model: Path) -> Loader:
    sources = tuple(open_sources([spec(cases, name) for name in names], cache_dir=str(cases / "cache")))
    lengths = np.concatenate([Tokens().of(source.num_images, source.text_bytes) for source in sources])
    tables = [Table(source.num_rows) for source in sources]
    plan = Plan(tables, lengths, seed=0, micro_batch_size=3, micro_batches_per_step=2)
    return Loader(sources, plan, str(model), None, Limits())


def check(sources: Iterable[Source], batches: Iterable[Batch]) -> None:
    """Every row has its outcome, and is seen once."""
    found: dict[str, tuple[str, str]] = {}
    for batch in batches:
        seen = zip(batch.sample_ids, batch.num_images.tolist(), strict=True)
        of_batch = {uid: (f"{count} images", "") for uid, count in seen}
        of_batch |= {row["id"]: (row["reason"], row["detail"]) for row in batch.rejected}
        assert not found.keys() & of_batch.keys()
        found |= of_batch
    for source, wanted in zip(sources, ROWS.values(), strict=True):
        outcomes = [found.pop(source.uid(row)) for row in range(source.num_rows)]
        assert [outcome for outcome, _ in outcomes] == [outcome for outcome, _ in wanted], source.name
        for (_, detail), (_, words) in zip(outcomes, wanted, strict=True):
            assert words in detail and "\n" not in detail
    assert not found


def test_every_row_has_its_outcome(cases: Path, model: Path) -> None:
    loader = loader_of(cases, ROWS, model)
    check(loader.sources, local_batches(loader, 0, loader.plan.steps_per_epoch))


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none_are_named(cases: Path, name: str) -> None:
    with pytest.raises(SourceError, match=FILES[name]) as caught:
        open_sources([spec(cases, name)])
    assert str(cases / name) in str(caught.value) and "\n" not in str(caught.value)


def test_no_part_is_lost(cases: Path, model: Path) -> None:
    """By a template that writes the first one only: answers are learnt whole, what is moved is told of the template."""
    loader = loader_of(cases, ["c08_parts_lost_by_template.jsonl"], model)
    processor = load_processor(find_model(str(model)))
    read: dict[str, tuple[str, str]] = {}
    for batch in local_batches(loader, 0, loader.plan.steps_per_epoch):
        for uid, ids, labels in zip(batch.sample_ids, batch.input_ids, batch.labels, strict=True):
            ids, learnt = ids[ids != processor.image_token_id], labels[labels != IGNORE_INDEX]
            read[uid[-1]] = (processor.decode(ids), processor.decode(learnt))
    assert "First half, second half." in read["1"][1]
    assert "Be kind. Answer in one word." in read["2"][0]
    assert "Left:  Right:  Which is red?" in read["3"][0]
    assert any("an image after a text" in notice for notice in check_template(processor))
    assert "\nWhat?" in read["4"][0] and "\n\n" not in read["4"][0]


def test_a_picture_in_a_part_is_read(cases: Path, teacher_folder: Callable[..., Path]) -> None:
    """The first row of those whose others have theirs in columns that nothing reads."""
    [source] = open_sources([spec(cases, "c03_image_in_part_or_other_column.jsonl", num_samples=1)])
    plan = Plan([Table(1)], np.zeros(1, np.uint16), seed=0, micro_batch_size=1, micro_batches_per_step=1)
    batch = Loader((source,), plan, str(teacher_folder()), None, Limits())(plan.row(0, 0))
    assert batch.num_images.tolist() == [1] and not batch.rejected


@pytest.mark.ray
def test_every_row_has_its_outcome_through_ray(cases: Path, model: Path, tmp_path: Path) -> None:
    import ray

    loader = loader_of(cases, ROWS, model)
    come: list[Batch] = []
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        steps = loader.plan.steps_per_epoch
        data = ray_dataset(loader, steps, tmp_path / "first", cpus_per_task=1.0, num_tasks=1)
        data.context.execution_options.preserve_order = True  # as `vlskv_ray.train` has it
        [shard] = data.streaming_split(1)
        begin_at(tmp_path / "first", 0)
        thread = threading.Thread(target=lambda: come.extend(ray_batches(shard)), daemon=True)
        thread.start()
        thread.join(HANG_SECONDS)
    finally:
        ray.shutdown()
    check(loader.sources, come)
