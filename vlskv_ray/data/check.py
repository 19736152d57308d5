"""Whether a model's own processor can prepare samples for it, tried before there are any."""

from typing import Any

import numpy as np

from vlskv_ray.data.chat import check_template, num_image_features
from vlskv_ray.model.build import LIBRARY_ERRORS, ModelFiles, load_config

PICTURES = ((48, 64), (64, 48), (32, 96), (50, 50))
"""Height and width of pictures of usual shapes."""


def check_processor(files: ModelFiles, processor: Any) -> list[str]:
    """Tries a model's own processor on conversations and pictures.

    Returns:
        what a reader should know of its chat template, see `check_template`.

    Raises:
        ValueError: labels cannot be placed with its template, or images get more or fewer tokens than features.
    """
    where = f"model.name_or_path: {files.name_or_path}"
    try:
        notices = check_template(processor)
    except LIBRARY_ERRORS as error:  # a template may compute anything
        raise ValueError(f"{where}: its chat template cannot be used: {' '.join(str(error).split())}") from error
    config = load_config(files)
    pictures = [np.zeros((height, width, 3), dtype=np.uint8) for height, width in PICTURES]
    processed = processor.image_processor(pictures, input_data_format="channels_last", do_pad=False)
    for i, size in enumerate(PICTURES):
        written = processor.replace_image_token(processed, image_idx=i).count(processor.image_token)
        made = num_image_features(config, size)
        if written != made:
            raise ValueError(
                f"{where}: its processor writes {written} image tokens for an image of (height, width) {size}, of "
                f"which the model makes {made} features; compare processor_config.json and preprocessor_config.json "
                f"with config.json: a processor that is not the model's own cannot be used"
            )
    return notices
