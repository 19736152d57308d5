"""A model's own processor: its tokenizer, chat template and image processor, checked before and after it is loaded."""

from typing import Any

from transformers import AutoProcessor, PreTrainedConfig

from vlskv_ray.model import presets
from vlskv_ray.model.build import LIBRARY_ERRORS, ModelFiles, load_config, naming_model, one_line
from vlskv_ray.model.folder import check_classes
from vlskv_ray.model.sandbox import problem_of
from vlskv_ray.model.sanity import image_token_key
from vlskv_ray.model.wrappers import Wrapper, wrapper_of


def load_processor(files: ModelFiles, *, tried: bool = False) -> Any:
    """The checkpoint's own processor, images by Pillow.

    Args:
        files: of the model. Those that do not come with the package are tried in a process of their own first.
        tried: whether the process that started this one has done that.

    Raises:
        ValueError: there is none, it has no chat template, cannot be used, or does not fit the model.
    """
    config = load_config(files)
    wrapper = wrapper_of(config.model_type)
    where = f"model.name_or_path: {files.name_or_path}"
    if files.preset:
        processor = presets.PRESETS[files.name_or_path].processor()
    else:
        processor = _read_processor(files, wrapper, tried)
    if processor.chat_template is None:
        raise ValueError(f"{where}: its processor has no chat template (chat_template.jinja), which data needs")
    _check_tokens(processor, config, where)
    with naming_model(files):
        wrapper.check_fit(processor, config, files.folder)
    return processor


def _read_processor(files: ModelFiles, wrapper: Wrapper, tried: bool) -> Any:
    """As transformers reads it from a folder; ValueError where it cannot, or it is another model type's."""
    where, folder = f"model.name_or_path: {files.name_or_path}", files.folder
    assert folder is not None
    with naming_model(files):
        check_classes(folder, wrapper.PROCESSOR_CLASSES, wrapper.IMAGE_PROCESSOR_CLASSES)
        wrapper.check_processor_files(folder)
    if not tried and folder not in presets.SHIPPED.values() and (problem := problem_of(folder)):
        raise ValueError(f"{where}: {problem}")
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise ValueError(f"{where}: its processor cannot be loaded: {one_line(error)}") from error
    kind, images = type(processor).__name__, type(getattr(processor, "image_processor", None)).__name__
    if kind not in wrapper.PROCESSOR_CLASSES or images not in wrapper.IMAGE_PROCESSOR_CLASSES:
        raise ValueError(
            f"{where}: its processor is a {kind} that reads images by a {images}; wanted a "
            f"{wrapper.PROCESSOR_CLASSES[0]} and a {wrapper.IMAGE_PROCESSOR_CLASSES[0]}, named in processor_config.json"
        )
    return processor


def _check_tokens(processor: Any, config: PreTrainedConfig, where: str) -> None:
    """ValueError where a tokenizer's ids are not those of the model's embeddings."""
    vocabulary, vocab_size = processor.tokenizer.get_vocab(), config.text_config.vocab_size
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{where}: its tokenizer has ids up to {largest} but the model has {vocab_size} embeddings; "
            f"a tokenizer that is not the model's own cannot be used"
        )
    token, wanted = processor.image_token, config.image_token_id
    if token not in vocabulary:
        raise ValueError(
            f"{where}: tokenizer.json: has no token {token!r}; wanted one with id {wanted}, the "
            f"{image_token_key(config)} of config.json; add it by "
            f"tokenizer.add_tokens({token!r}, special_tokens=True), and save the tokenizer again"
        )
    if processor.image_token_id != wanted:
        raise ValueError(
            f"{where}: its tokenizer's id of {token!r} is {processor.image_token_id}, but the model "
            f"puts images at id {wanted}; a tokenizer that is not the model's own cannot be used"
        )
    written = processor.tokenizer(2 * token, add_special_tokens=False)["input_ids"]
    if list(written) != [wanted, wanted]:
        raise ValueError(
            f"{where}: tokenizer.json: writes {2 * token!r} as {list(written)[:10]}; wanted {[wanted, wanted]}: "
            f"add {token!r} to its added_tokens, as a special one"
        )
