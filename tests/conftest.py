"""A tiny LLaVA-NeXT with real processing, as a checkpoint folder, and real encoded pictures for it."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import Batch, Encoded, collate
from vlskv_ray.data.sample import Sample
from vlskv_ray.model import presets
from vlskv_ray.model.build import build_student, find_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.register_assert_rewrite("checkpoints", "pages", "waiting")
pytest_plugins = ("runs", "clusters")
torch.set_num_threads(1)


TESTS = Path(__file__).parent
WITH_RAY = {
    path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("test_*.py") if "mark.ray" in path.read_text()
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests are run by one process, and all files that start Ray by the same one, so that there is one cluster
    at a time. (With pytest 9.2 the marks `xdist_group` of pytest-xdist 3.8 have no effect.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "with Ray" if file in WITH_RAY else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first: files that start Ray, then those of whole runs."""

    def order(item: pytest.Item) -> tuple[bool, bool]:
        file = item.nodeid.partition("::")[0]
        return file not in WITH_RAY, file.count("/") > 1

    items.sort(key=order)


@pytest.fixture(autouse=True)
def same_random_numbers_each_time() -> None:
    torch.manual_seed(0)


def tiny_config(text_model_type: str = "llama", **text: Any) -> Any:
    """6 text layers; one tile of 32 px in 8 px patches, up to 2 x 2 tiles more; tie_word_embeddings is the whole's."""
    tied = text.pop("tie_word_embeddings", False)
    return presets.llava_next_config(
        text_model_type,
        image_size=32,
        patch_size=8,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        tie_word_embeddings=tied,
        vision={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "projection_dim": 32,
            "initializer_range": 0.1,
        },
        text={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 300,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
        }
        | text,
    )


def save_teacher(folder: Path, config: Any) -> Path:
    """A stock checkpoint folder; biases drawn too, since stock initialisation leaves them zero."""
    teacher = presets.build_teacher(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    teacher.save_pretrained(folder)
    presets.llava_next_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny stock teacher with a given text backbone."""
    made: dict[str, Path] = {}

    def folder(text_model_type: str = "llama", **text: Any) -> Path:
        key = f"{text_model_type}{sorted(text.items())}"
        if key not in made:
            config = tiny_config(text_model_type, **text)
            made[key] = save_teacher(tmp_path_factory.mktemp("teacher"), config)
        return made[key]

    return folder


@pytest.fixture
def student(teacher_folder: Callable[..., Path]) -> Callable[..., Any]:
    """Builds a student whose new weights have moved away from the teacher's, so that nothing agrees by chance."""

    def build(
        text_model_type: str = "llama",
        dtype: torch.dtype = torch.float32,
        moved: bool = True,
        text: dict[str, Any] | None = None,
        **layers: Any,
    ) -> Any:
        folder = teacher_folder(text_model_type, **(text or {}))
        model = build_student(find_model(str(folder)), **({"num_key_value_layers": 2} | layers), dtype=dtype)
        if moved:
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.data += 0.05 * noise.to(parameter.dtype)
        return model

    return build


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    norms_in_their_own_dtype(monkeypatch)


def norms_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms that compute in the dtype of their input: transformers' go through float32 whatever the model's dtype,
    which would hide errors below 1e-7 from a float64 test."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def picture(width: int, height: int, seed: int = 0, format: str = "PNG") -> bytes:
    """An encoded picture of coloured noise in blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(blocks).resize((width, height)).save(encoded, format=format)
    return encoded.getvalue()


def conversation(*turns: str, images: int = 0) -> list[dict[str, Any]]:
    """Messages of alternating user and assistant turns, with so many images before the first."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image"} for _ in range(images)] + messages[0]["content"]
    return messages


def mixed_samples() -> list[Sample]:
    """Eight samples: none, one and two images, one and two turns, of quite different lengths."""
    return [
        Sample("a", conversation("what is it?", "a red cat", images=1), [picture(40, 30, 1)]),
        Sample("b", conversation("2+2?", "4"), []),
        Sample(
            "c", conversation("same?", "no", "why?", "one is blue", images=2), [picture(90, 30, 2), picture(33, 64, 3)]
        ),
        Sample("d", conversation("say hello to all of them, one by one", "hello hello hello"), []),
        Sample("e", conversation("how many?", "three", images=1), [picture(64, 64, 4, "JPEG")]),
        Sample("f", conversation("a", "b", "c", "d"), []),
        Sample("g", conversation("colour?", "green", images=1), [picture(20, 100, 5, "WEBP")]),
        Sample("h", conversation("spell dog", "d o g"), []),
    ]


@pytest.fixture
def encoded() -> list[Encoded]:
    return encoded_samples()


def encoded_samples() -> list[Encoded]:
    """`mixed_samples`, ready for the tiny models."""
    config = tiny_config()
    processor = presets.llava_next_processor(config)
    return [encode(sample, processor, config, Limits()) for sample in mixed_samples()]


def batch_of(samples: list[Encoded], **options: Any) -> Batch:
    return collate(samples, pad_token_id=presets.SPECIAL_TOKENS.index("<pad>"), **options)
