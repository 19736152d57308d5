"""What the package asks of a family of vision-language models.

Shapes: B samples, I images of all samples of a batch together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ImageInputs:
    """What is kept of one image: arrays by names that only its family knows.

    In a batch each name becomes one tensor, in which images come first, [I, ...]; an array that is smaller than others
    of its name is padded with zeros at the end of each dimension. `Wrapper.model_inputs` makes of these what the model
    takes: one image after another without the padding, say, where `sizes` tell how much of each row is its own (the
    patches of Qwen-VL, the tiles of InternVL), or the images of each sample together (Idefics3).
    """

    sizes: Mapping[str, NDArray[np.int64]]
    """What tells how many features the model makes of it: (height, width), rows and columns of tiles, a grid.
    Never empty: they stay where pixels are not needed any more, and say how many images a sample has."""
    pixels: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What the model looks at, and masks and scales for it. Empty where the states of a sample are known already."""


VISION_TOWER, PROJECTOR, TEXT = "vision_tower", "projector", "text"
"""Parts of a model, see `Wrapper.part_of`."""


class Wrapper(Protocol):
    """A module with these names is a family. Checks raise `Damaged` with file, key, value and what was wanted."""

    MODEL_TYPE: str
    """As config.json has it."""
    PROCESSOR_CLASSES: tuple[str, ...]
    IMAGE_PROCESSOR_CLASSES: tuple[str, ...]
    """Names of classes that the files of its processor may give, the usual one first."""

    # ------------------------------------------------------------------------------------------------------ its files
    def check_config(self, declared: dict[str, Any]) -> None:
        """Values of config.json are of the right type, and as large as a real model has them at most.

        Args:
            declared: the file's content, before any library reads it. Its text model is checked already.
        """

    def check_relations(self, config: PreTrainedConfig) -> None:
        """Values of a config fit each other, so that the model can be built and run.

        Args:
            config: as transformers has read it, defaults included. Its text model is checked already.
        """

    def least_vision_weights(self, config: PreTrainedConfig) -> int:
        """How many weights the vision tower of a model has at least."""

    def part_of(self, name: str) -> str:
        """The part that a weight of this name belongs to, as `named_parameters` of the model has it: VISION_TOWER, its
        PROJECTOR with all else between it and the text model, or TEXT, to which embeddings and head belong."""

    def check_processor_files(self, folder: Path) -> None:
        """Likewise `check_config`, for the files of the processor, where there are any."""

    def check_fit(self, processor: Any, config: PreTrainedConfig, folder: Path | None) -> None:
        """A processor writes as many image tokens, for pixels of the shape, that its model is made for.

        Args:
            processor: a stock one of this family. What older files leave to the config is completed.
            config: of its model.
            folder: where its files are; None where it has none.
        """

    def what_is_read(self, config: PreTrainedConfig, processor: Any) -> dict[str, Any]:
        """What decides which pixels a model is made for, in words for a reader: two models of which all of it is equal
        see the same."""

    # ----------------------------------------------------------------------------------------------------- its images
    def prepare_images(
        self, processor: Any, images: Sequence[Image.Image], *, as_bytes: bool = True
    ) -> tuple[list[ImageInputs], list[str]]:
        """Images as the stock image processor makes them, and the text that stands for each in a rendered conversation.

        Args:
            processor: a stock one of this family.
            images: RGB, all of one sample.
            as_bytes: leave out what can be done to a whole batch later, see `model_inputs`, so that pixels travel as
                bytes. Else they are the stock ones bit for bit.
        """

    def num_features(self, config: PreTrainedConfig, sizes: Mapping[str, Any]) -> int:
        """How many features a model makes of an image of these `ImageInputs.sizes`, by its own arithmetic: each takes
        the place of one image token."""

    def model_inputs(self, config: PreTrainedConfig, batch: Any) -> dict[str, Tensor]:
        """The arguments of the model's forward beside the ids of tokens and their mask; none where it needs none.

        Args:
            config: of the model.
            batch: a `Batch` of data/collate.py, be it of conversations or, with no labels that count, of prompts. Its
                images are all together in `sizes` and `pixels`, see `ImageInputs`; `num_images` says whose they are.
                Types of tokens, where a family has such, can be told from `input_ids` and `labels`.
        """
