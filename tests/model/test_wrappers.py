"""A second family of models is one more object to register: LLaVA 1.5, which is none of the package's own, goes all the
way from a picture to a trained student."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import batch_of, mixed_samples, picture
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlskv_ray.config import Config
from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.collate import Encoded, from_row, parts, tensors_of, to_row
from vlskv_ray.data.images import load_image
from vlskv_ray.data.templates import render
from vlskv_ray.evaluation.ask import open_image, read_question
from vlskv_ray.evaluation.loading import load
from vlskv_ray.generate import main as generate
from vlskv_ray.launch.driver import train
from vlskv_ray.model import presets, wrappers
from vlskv_ray.model.build import build_student, find_model, load_config, trainable_parameters
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.sanity import VISION, Number, check_image_processor, check_sections, check_value, processor_files
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.model.wrappers import PROJECTOR, TEXT, VISION_TOWER, ImageInputs, register, wrapper_of
from vlskv_ray.training.distill import DistillationLoss, shared_pass
from vlskv_ray.training.step import GradientBuffer, train_step

SIDE, PATCH = 32, 8


class Llava:
    """LLaVA 1.5: every image is one square, of which each patch is a feature; the class token is none."""

    MODEL_TYPE = "llava"
    PROCESSOR_CLASSES: tuple[str, ...] = ("LlavaProcessor",)
    IMAGE_PROCESSOR_CLASSES: tuple[str, ...] = ("CLIPImageProcessor", "CLIPImageProcessorPil")

    def check_config(self, declared: dict[str, Any]) -> None:
        sizes = {"image_size": Number(1, 4096, "CLIP has 336"), "patch_size": Number(1, 1024, "CLIP has 14")}
        check_sections(declared, {"vision_config": VISION | sizes})

    def check_relations(self, config: Any) -> None:
        vision = config.vision_config
        fits = vision.image_size % vision.patch_size == 0
        check_value("config.json", ["vision_config", "patch_size"], vision.patch_size, None if fits else "a divisor")

    def least_vision_weights(self, config: Any) -> int:
        vision = config.vision_config
        return int(vision.num_hidden_layers * 2 * vision.hidden_size * vision.intermediate_size)

    def part_of(self, name: str) -> str:
        if name.startswith("model.vision_tower."):
            return VISION_TOWER
        return PROJECTOR if name.startswith("model.multi_modal_projector.") else TEXT

    def check_processor_files(self, folder: Path) -> None:
        for name, _, section, images in processor_files(folder):
            check_image_processor(name, section, images)

    def check_fit(self, processor: Any, config: Any, folder: Path | None) -> None:
        wanted = config.vision_config.patch_size
        problem = None if processor.patch_size == wanted else f"{wanted}, as config.json has vision_config.patch_size"
        check_value("processor_config.json", ["patch_size"], processor.patch_size, problem)

    def what_is_read(self, config: Any, processor: Any) -> dict[str, Any]:
        return {"image size": (config.vision_config.image_size, config.vision_config.patch_size)}

    def prepare_images(
        self, processor: Any, images: Sequence[Image.Image], *, as_bytes: bool = True
    ) -> tuple[list[ImageInputs], list[str]]:
        processed = processor.image_processor(list(images))  # this family's pixels are never bytes
        inputs = [
            ImageInputs({"shown": np.array([image.height, image.width])}, {"square": np.asarray(pixels)})
            for image, pixels in zip(images, processed["pixel_values"], strict=True)
        ]
        return inputs, [processor.replace_image_token(processed, image_idx=i) for i in range(len(images))]

    def num_features(self, config: Any, sizes: Mapping[str, Any]) -> int:
        return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2)

    def model_inputs(self, config: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values": batch.pixels["square"]} if batch.pixels else {}


@pytest.fixture
def llava(monkeypatch: pytest.MonkeyPatch) -> Llava:
    """Registered, for the length of a test."""
    monkeypatch.setattr(wrappers, "FAMILIES", dict(wrappers.FAMILIES))
    register(Llava())
    return Llava()


@functools.cache
def config() -> LlavaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    special = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<pad>"}
    ids = {name: presets.SPECIAL_TOKENS.index(token) for name, token in special.items()}
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 32, "initializer_range": 0.1}
    text = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"vocab_size": 300, "max_position_embeddings": 512, "initializer_range": 0.15}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **sizes, **tower),
        text_config=CONFIG_MAPPING["llama"](**ids, **sizes, **text),
        image_token_index=presets.SPECIAL_TOKENS.index("<image>"),
    )


@pytest.fixture
def folder(llava: Llava, tmp_path: Path) -> Path:
    """A checkpoint of a tiny LLaVA 1.5, as transformers saves it."""
    presets.build_teacher(config(), seed=1).save_pretrained(tmp_path / "llava")
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        presets.byte_tokenizer(300),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=presets.CHAT_TEMPLATE,
    ).save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def encoded_by(folder: Path) -> list[Encoded]:
    files = find_model(str(folder))
    return [encode(s, load_processor(files, tried=True), load_config(files), Limits()) for s in mixed_samples()]


def test_an_unknown_family_is_one_clear_error(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """With those that are known, whoever registered them."""
    assert wrapper_of("llava_next").MODEL_TYPE == "llava_next" and isinstance(wrapper_of("llava"), Llava)
    with pytest.raises(ValueError, match=r"^model_type 'blip' is not supported; supported: llava_next, llava$"):
        wrapper_of("blip")
    with pytest.raises(ValueError, match=r"^model_type \['llava'\] is not supported"):
        wrapper_of(["llava"])  # type: ignore[arg-type] # a file from elsewhere may hold anything
    monkeypatch.delitem(wrappers.FAMILIES, "llava")
    with pytest.raises(ValueError, match=r"^model_type 'llava' is not supported; supported: llava_next$"):
        wrapper_of("llava")


def test_its_samples_are_the_stock_processors(folder: Path) -> None:
    """The same ids and pixels as in one call of it, beside other samples and on their way to a worker."""
    files = find_model(str(folder))
    processor = load_processor(files)
    assert check_processor(files, processor) == []
    samples, encoded = mixed_samples(), encoded_by(folder)
    batch = from_row(to_row(batch_of(encoded)))
    inputs, image = batch.model_inputs(config()), 0
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert batch.num_images.tolist() == [len(sample.images) for sample in samples]
    for row, sample in enumerate(samples):
        pictures = [load_image(data) for data in sample.images]
        text = render(processor, sample.messages).text
        stock = processor(text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt")
        assert torch.equal(batch.input_ids[row, batch.attention_mask[row].bool()], stock["input_ids"][0])
        if pictures:
            assert torch.equal(inputs["pixel_values"][image : image + len(pictures)], stock["pixel_values"])
        image += len(pictures)
    assert image == len(inputs["pixel_values"]) == 5


def test_its_untrained_student_is_its_teacher(folder: Path) -> None:
    """With one layer left to SwiftKV, whose keys and values are then of the teacher's own input."""
    student = build_student(find_model(str(folder)), num_key_value_layers=5)
    inputs = batch_of(encoded_by(folder)).model_inputs(student.config)
    there = inputs["attention_mask"].bool()
    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(student) is type(teacher)
    with torch.no_grad():
        stock, ours = teacher(**inputs).logits[there], student(**inputs).logits[there]
        swiftkv_backbone(student).config.swiftkv = False
        assert torch.equal(student(**inputs).logits[there], stock)
    assert torch.allclose(ours, stock, atol=1e-5) and stock.std() > 0.1


def test_its_student_learns_as_any_other(folder: Path) -> None:
    """One shared pass is two whole ones, of a batch and of its parts; a step moves SwiftKV weights alone."""
    model, encoded = build_student(find_model(str(folder)), num_key_value_layers=2), encoded_by(folder)
    batch = batch_of(encoded)
    inputs, keep = batch.model_inputs(model.config), torch.nn.functional.pad(batch.labels[:, 1:] >= 0, (0, 1))
    with torch.no_grad():
        states = shared_pass(model, batch)
        of_parts = [shared_pass(model, part) for part in parts(batch, max_tokens=1)]
        student = model.base_model(**inputs, use_cache=False).last_hidden_state[keep]
        swiftkv_backbone(model).config.swiftkv = False
        teacher = model.base_model(**inputs, use_cache=False).last_hidden_state[keep]
        swiftkv_backbone(model).config.swiftkv = True
    assert len(of_parts) == len(encoded) and not torch.allclose(student, teacher, atol=1e-2)
    assert torch.allclose(states.student, student, atol=5e-6) and torch.allclose(states.teacher, teacher, atol=5e-6)
    assert torch.allclose(torch.cat([part.student for part in of_parts]), student, atol=5e-6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = trainable_parameters(model)
    gradients = GradientBuffer(trained.values())
    result = train_step(model, torch.optim.SGD(trained.values(), lr=1.0), gradients, [batch], DistillationLoss())
    assert result.sums.kl_vision > 0 and result.sums.kl_text > 0 and result.grad_norm > 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == ("_swiftkv" not in name), name


def test_it_goes_through_a_whole_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data, teacher cache, evaluation, savings and a question to the student, without a line for it in the package."""
    run = {
        "epochs": 2,
        "micro_batch_size": 3,
        "model": {"name_or_path": str(folder), "num_key_value_layers": 2, "teacher_cache": "disk"},
        "data": {"sources": [{"name": "shapes", "num_samples": 6}]},
        "evaluation": {"sources": [{"name": "shapes", "split": "test", "num_samples": 3}]},
        "cluster": {"num_workers": 0, "threads_per_worker": 1},
        "output": {"dir": str(tmp_path), "name": "run", "level": "error"},
    }
    assert train(Config.model_validate(run)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and '"cached_samples": 3' in lines[-1] and "kl_vision" in lines[-1]
    assert '"savings"' in (tmp_path / "run" / "evaluation.json").read_text()
    (tmp_path / "x.png").write_bytes(picture(50, 40))
    model, processor = load(str(tmp_path / "run" / "final"))
    shown = [open_image(str(tmp_path / "x.png"))]
    inputs, _ = read_question(model.config, processor, "hello", shown)
    stock = processor(text="<image>", images=shown, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], stock["pixel_values"])
    asked = ["--model", str(tmp_path / "run" / "final"), "--prompt", "hello", "--image", str(tmp_path / "x.png")]
    assert generate([*asked, "--max-new-tokens", "3"]) == 0
    assert f"({(SIDE // PATCH) ** 2} of images)" in capsys.readouterr().out


def test_images_need_not_be_of_one_shape() -> None:
    """Each keeps its own numbers in the corner of its name's tensor, through cutting and travelling."""
    rng = np.random.default_rng(0)
    grids = [(2, 3), (4, 1), (1, 5)]
    images = [
        ImageInputs({"grid": np.array(grid)}, {"map": rng.normal(size=grid), "level": np.array(i, dtype=np.uint8)})
        for i, grid in enumerate(grids)
    ]
    ids = np.arange(4)
    samples = [Encoded("a", ids, ids, images[:1]), Encoded("b", ids, ids), Encoded("c", ids, ids, images[1:])]
    batch = from_row(to_row(batch_of(samples)))
    assert batch.num_images.tolist() == [1, 0, 2] and batch.sizes["grid"].tolist() == [list(grid) for grid in grids]
    assert batch.pixels["map"].shape == (3, 4, 5) and batch.pixels["level"].tolist() == [0, 1, 2]
    for image, (rows, columns), whole in zip(images, grids, batch.pixels["map"], strict=True):
        assert np.array_equal(whole[:rows, :columns], image.pixels["map"])
        assert whole.count_nonzero() == rows * columns
    first, second, third = parts(batch, max_tokens=1)
    assert tensors_of(second).keys().isdisjoint({"sizes.grid", "pixels.map", "pixels.level"})
    assert torch.equal(torch.cat([first.pixels["map"], third.pixels["map"]]), batch.pixels["map"])
