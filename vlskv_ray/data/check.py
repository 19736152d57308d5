"""Whether a model's own processor can prepare samples for it, tried before there are any."""

from typing import Any

from PIL import Image

from vlskv_ray.data.labels import check_template
from vlskv_ray.model.build import LIBRARY_ERRORS, ModelFiles, load_config
from vlskv_ray.model.wrappers import wrapper_of

PICTURES = ((64, 48), (48, 64), (96, 32), (50, 50))
"""Width and height of pictures of usual shapes."""


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
    wrapper = wrapper_of(config.model_type)
    images, placeholders = wrapper.prepare_images(processor, [Image.new("RGB", size) for size in PICTURES])
    for (width, height), image, placeholder in zip(PICTURES, images, placeholders, strict=True):
        written, made = placeholder.count(processor.image_token), wrapper.num_features(config, image.sizes)
        if written != made:
            raise ValueError(
                f"{where}: its processor writes {written} image tokens for an image of (height, width) "
                f"{(height, width)}, of which the model makes {made} features; compare processor_config.json and "
                f"preprocessor_config.json with config.json: a processor that is not the model's own cannot be used"
            )
    return notices
