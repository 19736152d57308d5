"""A text model and a vision tower, made into one model, and the proof that its text model is what it was.

The text model's modules become the new model's own, so that a large one is in memory once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AddedToken, AutoModelForImageTextToText

from vlskv_ray.assembly.chat_template import PLAIN, takes_parts, with_pictures
from vlskv_ray.assembly.text_model import TextModel
from vlskv_ray.assembly.vision_tower import PROJECTOR_FILE, VisionTower
from vlskv_ray.data.check import check_processor
from vlskv_ray.data.labels import check_template
from vlskv_ray.model import presets
from vlskv_ray.model.build import LIBRARY_ERRORS, build_plain, find_model, load_config, one_line
from vlskv_ray.model.processor import load_processor
from vlskv_ray.model.wrappers import PROJECTOR, llava_next

IMAGE_TOKEN = "<image>"
MULTIPLE = 64
"""Of which the new number of embeddings is one: matrix products are slow at odd sizes."""
TILES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
"""Rows and columns of tiles that LLaVA-NeXT sees a picture in."""
NEW_TILES = ((1, 1),)
"""The same of a new tower."""
TEXTS = (
    "The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
    "Ein Bild sagt mehr als tausend Worte; 12 * 12 = 144.",
    "What is the difference between a list and a tuple in Python? Answer in one sentence.",
)
"""On which the new model must be the text model."""
LAYER_OF_TRAINED = -2
"""Whose states a trained tower's features are, as in LLaVA; of a new one all layers are used."""


@dataclass(frozen=True)
class Assembled:
    """A model that is made, not written yet."""

    model: Any
    processor: Any
    num_tokens: int
    """Embeddings of the text model as it was."""
    logits: list[Tensor]
    """Of the text model as it was on `TEXTS`, [tokens, num_tokens] each."""
    keeps_template: bool
    """The chat template is the text model's own, which renders pictures already."""


def assemble(
    text: TextModel,
    tower: VisionTower,
    *,
    grid: Sequence[tuple[int, int]] | None = None,
    template: str | None = None,
    image_token: str = IMAGE_TOKEN,
    seed: int = 0,
) -> Assembled:
    """A LLaVA-NeXT of a text model, which becomes part of it, and a vision tower, with a new projector or the one that
    was trained with the tower.

    Args:
        text: as `read_text_model` gives it.
        tower: as `read_tower` or `draw_tower` gives it.
        grid: rows and columns of the tiles that a picture may be seen in, beside the whole of it; None for those that
            its projector was trained with, `TILES` of a tower without one, one tile of a new tower.
        template: a chat template; None for the text model's own, `PLAIN` for USER: and ASSISTANT:.
        image_token: that stands for a feature of an image.
        seed: a new projector is drawn from it.

    Raises:
        ValueError: the text model has no chat template, or one that cannot be used, its weights are no numbers, or the
            projector was trained for another text model.
    """
    tokenizer, num_tokens = text.tokenizer, text.config.vocab_size
    logits = logits_on_texts(text.model, tokenizer)
    if not all(of_text.isfinite().all() for of_text in logits):
        raise ValueError(
            f"--text: {text.name}: its logits on texts are no numbers: weights of it are damaged, or too large for "
            f"{text.model.dtype}; compare its files with the original, or give another --dtype"
        )
    chat_template, keeps = _choose_template(text, template, image_token)
    image_token_id = add_image_token(text, image_token)
    grid = grid or (tower.projector.grid if tower.projector else NEW_TILES if tower.is_new else TILES)
    config = llava_next.make_config(text.config, tower.config, image_token_id, grid)
    config.vision_feature_layer = -1 if tower.is_new else LAYER_OF_TRAINED
    model = _shell(config, seed).to(text.model.dtype)
    if tower.projector:
        config.vision_feature_layer = tower.projector.feature_layer
        _take_projector(model, tower)
    model.model.language_model = text.model.get_decoder()
    model.lm_head = text.model.get_output_embeddings()
    model.model.vision_tower = tower.model
    model.config = model.model.config = config
    model.tie_weights()
    model.generation_config = text.model.generation_config
    processor = llava_next.make_processor(config, tokenizer, chat_template, **tower.image_processor)
    try:
        check_template(processor)
    except LIBRARY_ERRORS as error:  # a template may compute anything
        whose = f"that of {text.name}" if template is None else "it"
        raise ValueError(
            f"--chat-template: {whose} cannot be used: {one_line(error)}; another can be given as a file, or "
            f"{PLAIN!r} for turns that begin with USER: and ASSISTANT:"
        ) from error
    return Assembled(model.eval(), processor, num_tokens, logits, keeps)


def _choose_template(text: TextModel, template: str | None, image_token: str) -> tuple[str, bool]:
    """The chat template, and whether it is the text model's own as it is."""
    if template == PLAIN:
        return presets.CHAT_TEMPLATE, False
    tokenizer = text.tokenizer
    if template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        raise ValueError(
            f"--chat-template: {text.name} has none, as models have that were not taught to chat; wanted a file with "
            f"one, or {PLAIN!r} for turns that begin with USER: and ASSISTANT:"
        )
    if takes_parts(tokenizer, image_token):
        return tokenizer.chat_template, template is None
    return with_pictures(tokenizer.chat_template, image_token), False


def add_image_token(text: TextModel, image_token: str) -> int:
    """Gives a text model an image token, with embeddings for it where it has none to spare; returns its id.

    New embeddings are the mean of those there are, so that their logits are those of an average token: next to nothing.
    """
    tokenizer, model = text.tokenizer, text.model
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
    has = model.config.vocab_size
    if image_token_id >= has:
        model.resize_token_embeddings(-(-(image_token_id + 1) // MULTIPLE) * MULTIPLE, mean_resizing=False)
        with torch.no_grad():
            for embeddings in {model.get_input_embeddings(), model.get_output_embeddings()}:
                embeddings.weight[has:] = embeddings.weight[:has].float().mean(dim=0).to(embeddings.weight.dtype)
    return image_token_id


def _shell(config: Any, seed: int) -> Any:
    """A model of this config with one small layer in place of its text model and its tower, for the rest of it."""
    small = copy.deepcopy(config)
    for part in (small.text_config, small.vision_config):
        part.num_hidden_layers = 1
    small.text_config.vocab_size, small.text_config.pad_token_id = 8, 0
    if getattr(small.text_config, "layer_types", None):
        small.text_config.layer_types = small.text_config.layer_types[:1]
    small.image_token_index = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(small)


def _take_projector(model: Any, tower: VisionTower) -> None:
    """Gives a model the projector that was trained with its tower. ValueError where it does not fit the text model."""
    trained = tower.projector.weights if tower.projector else {}
    own = {name: weight for name, weight in model.named_parameters() if llava_next.part_of(name) == PROJECTOR}
    for name in sorted(own.keys() | trained.keys()):
        wanted, got = (list(found[name].shape) if name in found else None for found in (own, trained))
        if wanted != got:
            raise ValueError(
                f"--vision: {tower.name}/{PROJECTOR_FILE}: {name} is {got}; wanted {wanted} for this text model: "
                f"it was trained for another one; remove the file for a new projector"
            )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(trained[name])


@torch.inference_mode()
def logits_on_texts(model: Any, tokenizer: Any) -> list[Tensor]:
    """Of a model, on `TEXTS`: [tokens, embeddings] each, in float32."""
    encoded = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in TEXTS]
    return [model(input_ids=ids, use_cache=False).logits[0].float() for ids in encoded]


def check_written(folder: Path, assembled: Assembled) -> tuple[float, list[str]]:
    """Reads a model that was written, as a run would, and compares it with the text model that it was made from.

    Returns:
        the largest difference between logits on `TEXTS`, and what a reader should know of the chat template.

    Raises:
        ValueError: it cannot be used for a run, or is not the text model on texts.
    """
    files = find_model(str(folder))
    load_config(files)
    processor = load_processor(files)
    notices = check_processor(files, processor)
    model = build_plain(files).to(assembled.model.dtype)
    found = logits_on_texts(model, processor.tokenizer)
    difference = largest = 0.0
    for before, after in zip(assembled.logits, found, strict=True):
        if len(before) != len(after):
            raise ValueError("the tokenizer splits texts otherwise once it has the image token; nothing was written")
        difference = max(difference, (before - after[:, : assembled.num_tokens]).abs().max().item())
        largest = max(largest, before.abs().max().item())
    allowed = largest * (1e-4 if model.dtype == torch.float32 else 3e-2)  # a larger head may sum in another order
    if not difference <= allowed:
        raise ValueError(
            f"logits on texts differ from the text model's by up to {difference:.2g}, of up to {largest:.2g}; nothing "
            f"was written"
        )
    return difference, notices
