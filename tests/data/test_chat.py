"""Labels where the answers are, placeholders as many as features, and samples that do not fit left out whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import conversation, picture, tiny_config
from transformers import AutoModelForImageTextToText

from vlskv_ray.data.chat import Limits, encode, render
from vlskv_ray.data.collate import IGNORE_INDEX, collate
from vlskv_ray.data.images import load_image
from vlskv_ray.data.labels import check_template
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.model import presets
from vlskv_ray.model.wrappers import llava_next

# Three manners of chat: with an end-of-turn token, in brackets with an end-of-sequence token, and with no end at all.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} [/INST]{% else %} {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {"preset": presets.CHAT_TEMPLATE, "chatml": CHATML, "mistral": MISTRAL, "vicuna": VICUNA}
END = {"preset": "</s>", "chatml": "<|im_end|>", "mistral": "</s>", "vicuna": " "}


def processor_with(template: str) -> Any:
    processor = presets.llava_next_processor(tiny_config())
    processor.chat_template = TEMPLATES[template]
    if template == "chatml":
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return processor


def supervised(encoded: Any, processor: Any) -> list[str]:
    """The runs of supervised tokens, as text."""
    runs, current = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            current.append(int(token))
        elif current:
            runs.append(processor.tokenizer.decode(current))
            current = []
    return [*runs, processor.tokenizer.decode(current)] if current else runs


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_labels_fall_on_the_answers(template: str, images: int) -> None:
    """Both answers of two turns with their end-of-turn tokens, and not a word else, wherever images expand."""
    processor = processor_with(template)
    messages = conversation("what is it?", "a blüe cat", "sure?", "yes", images=images)
    pictures = [picture(40 + 30 * i, 50, i) for i in range(images)]
    encoded = encode(Sample("x", messages, pictures), processor, tiny_config(), Limits())
    runs = [run.lstrip() for run in supervised(encoded, processor)]
    end = END[template]
    last = f"{end}</s>" if template == "vicuna" else end  # where a template has no end, one is added to the last answer
    assert runs == [f"a blüe cat{end}", f"yes{last}"]
    check_template(processor)


CLOSINGS = {
    "<|im_end|>\n": "<|im_end|>",  # the tokenizer's own end of sequence is another
    " </s> \n": " </s>",
    "</s>\n</s>": "</s>",
    "<|im_end|>\n</s>": "<|im_end|>",
    "</note><|im_end|>\n": "</note><|im_end|>",
    "</note>\n<end>\n": "</note>\n<end>",
    "<end>\n": "<end>",
    "\n---\n": "\n---\n",
}
"""What a template may write after an answer, and what of it is learnt; `</note>` and `<end>` are not special."""


@pytest.mark.parametrize(("closing", "learnt"), CLOSINGS.items())
def test_nothing_after_the_stop_token_is_learnt(closing: str, learnt: str) -> None:
    """Of each answer, the last one too; the model reads all that the template writes. Without one nothing is cut."""
    processor = processor_with("chatml")
    processor.tokenizer.add_tokens(["</note>", "<end>"])
    written = closing.replace("\n", "\\n")
    processor.chat_template = CHATML.replace("<|im_end|>\n", "{{ '" + written + "' }}")
    messages = conversation("what?", "a cat", "sure?", "yes")
    encoded = encode(Sample("x", messages, []), processor, tiny_config(), Limits())
    added = "</s>" if closing.strip() == "---" else ""
    assert supervised(encoded, processor) == [f"a cat{learnt}", f"yes{learnt}{added}"]
    assert processor.tokenizer.decode(encoded.input_ids).endswith(f"yes{closing}{added}")


def test_the_name_of_a_stop_token_in_an_answer_ends_nothing() -> None:
    processor = processor_with("chatml")
    sample = Sample("x", conversation("what ends a turn?", "<|im_end|> does, or </s>"), [])
    encoded = encode(sample, processor, tiny_config(), Limits())
    assert supervised(encoded, processor) == ["<|im_end|> does, or </s><|im_end|>"]


def test_a_system_message_is_not_learnt() -> None:
    processor = processor_with("chatml")
    messages = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *conversation("a?", "b")]
    encoded = encode(Sample("x", messages, []), processor, tiny_config(), Limits())
    assert supervised(encoded, processor) == ["b<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    """Such as one that drops what an assistant thought once it is asked again."""
    processor = processor_with("chatml")
    processor.chat_template = CHATML.replace(
        "{{ part['text'] }}", "{{ part['text'] if loop.last and message == messages[-1] else part['text'][:2] }}"
    )
    with pytest.raises(ValueError, match="writes message 2 of a conversation differently once others follow"):
        check_template(processor)


@pytest.mark.parametrize("template", TEMPLATES)
def test_equals_the_stock_processor_in_one_call(template: str) -> None:
    """Ids and pixels are those of `processor(text=..., images=...)`, however many images are processed at once."""
    processor = processor_with(template)
    messages = conversation("compare", "done", images=3)
    pictures = [picture(100, 40, 1), picture(30, 31, 2), picture(50, 90, 3)]
    text = render(processor, messages).text
    stock = processor(
        text=[text],
        images=[load_image(data) for data in pictures],
        add_special_tokens=not text.startswith("<s>"),
        return_tensors="np",
    )
    for at_once in (1, 2, 8):
        encoded = encode(
            Sample("x", messages, pictures), processor, tiny_config(), Limits(image_processing_batch_size=at_once)
        )
        assert np.array_equal(encoded.input_ids, stock["input_ids"][0])
        inputs = llava_next.model_inputs(tiny_config(), collate([encoded], 0))
        for image, ours, theirs in zip(encoded.images, inputs["pixel_values"], stock["pixel_values"], strict=True):
            tiles = image.pixels["tiles"]
            assert tiles.dtype == np.uint8
            assert np.abs(ours.numpy() - theirs)[: len(tiles)].max() < 1e-6 and not theirs[len(tiles) :].any()
        assert np.array_equal(inputs["image_sizes"], stock["image_sizes"])


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 40}},  # tiles are resized and cropped, as no released model has it
        {"image_mean": [0.94] * 3, "image_std": [3.0] * 3},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [60.0] * 3},
    ],
)
def test_pixels_are_the_stock_processors_whatever_its_options(options: dict[str, Any]) -> None:
    processor = presets.llava_next_processor(tiny_config())
    for name, value in options.items():
        setattr(processor.image_processor, name, type(processor.image_processor)(**{name: value}).__dict__[name])
    data = picture(100, 40, 1)
    encoded = encode(Sample("x", conversation("a?", "b", images=1), [data]), processor, tiny_config(), Limits())
    (stock,) = processor.image_processor([load_image(data)], return_tensors="np")["pixel_values"]
    ours = llava_next.model_inputs(tiny_config(), collate([encoded], 0))["pixel_values"]
    assert np.abs(ours[0].numpy() - stock).max() < 1e-6 * max(1, np.abs(stock).max())


@pytest.mark.parametrize("template", ["chatml", "mistral", "vicuna"])
def test_placeholders_equal_features_for_any_size(teacher_folder: Callable[..., Path], template: str) -> None:
    """300 random sizes with each template: ids hold as many image tokens as the model itself makes features."""
    processor, rng = processor_with(template), np.random.default_rng(7)
    model = AutoModelForImageTextToText.from_pretrained(teacher_folder()).model
    sizes = np.exp(rng.uniform(np.log(8), np.log(400), size=(300, 2))).astype(int)
    at = 0
    while at < len(sizes):
        count = int(rng.integers(1, 4))
        group = [(int(w), int(h)) for w, h in sizes[at : at + count] if max(w, h) <= 50 * min(w, h)]
        at += count
        sample = Sample("x", conversation("a?", "b", images=len(group)), [picture(w, h) for w, h in group])
        encoded = encode(sample, processor, tiny_config(), Limits())
        inputs = llava_next.model_inputs(tiny_config(), collate([encoded], 0))
        with torch.no_grad():
            made = model.get_image_features(**inputs).pooler_output
        assert inputs["image_sizes"].tolist() == [[h, w] for w, h in group]
        assert [len(f) for f in made] == [llava_next.num_image_features(tiny_config(), (h, w)) for w, h in group]
        assert (encoded.input_ids == processor.image_token_id).sum() == sum(map(len, made))


def test_no_image_no_placeholder() -> None:
    processor = processor_with("preset")
    encoded = encode(Sample("x", conversation("a?", "b"), []), processor, tiny_config(), Limits())
    assert not (encoded.input_ids == processor.image_token_id).any() and encoded.images == []


@pytest.mark.parametrize("size", [(1920, 1080), (1000, 100), (224, 224), (640, 480), (100, 1000), (8, 9)])
def test_features_of_the_small_preset(size: tuple[int, int]) -> None:
    config = presets.PRESETS["small-llava-next"].config()
    processor = presets.llava_next_processor(config)
    sample = Sample("x", conversation("a?", "b", images=1), [picture(*size)])
    encoded = encode(sample, processor, config, Limits())
    wanted = {(1920, 1080): 316, (1000, 100): 226, (224, 224): 406, (640, 480): 346}
    if size in wanted:
        assert (encoded.input_ids == processor.image_token_id).sum() == wanted[size]


# ------------------------------------------------------------------------------------------------ what does not fit
def rejection(sample: Sample, limits: Limits = Limits(), processor: Any = None) -> Rejected:  # noqa: B008
    with pytest.raises(Rejected) as reason:
        encode(sample, processor or processor_with("preset"), tiny_config(), limits)
    return reason.value


def test_a_long_sample_is_left_out_whole() -> None:
    sample = Sample("x", conversation("a" * 50, "b"), [])
    length = len(encode(sample, processor_with("preset"), tiny_config(), Limits()).input_ids)
    assert len(encode(sample, processor_with("preset"), tiny_config(), Limits(max_length=length)).input_ids) == length
    reason = rejection(sample, Limits(max_length=length - 1))
    assert reason.code == "too_long" and f"{length} tokens" in reason.detail and "data.max_length" in reason.detail


def test_a_long_image_says_so() -> None:
    sample = Sample("x", conversation("a", "b", images=1), [picture(64, 64)])
    assert rejection(sample, Limits(max_length=60)).code == "too_long_image"
    assert rejection(sample, Limits(max_length=95)).code == "too_long"


def test_too_many_images() -> None:
    sample = Sample("x", conversation("a", "b", images=2), [picture(20, 20), picture(20, 20)])
    reason = rejection(sample, Limits(max_images_per_sample=1))
    assert reason.code == "too_many_images" and "data.max_images_per_sample=1" in reason.detail


def test_the_image_token_as_text_is_not_taken_for_an_image() -> None:
    """Not where the row has an image as well: both are what they are."""
    processor = processor_with("preset")
    sample = Sample("x", conversation("what does <image> mean?", "<image> is a tag", images=1), [picture(40, 40)])
    encoded = encode(sample, processor, tiny_config(), Limits())
    assert (encoded.input_ids == processor.image_token_id).sum() == llava_next.num_image_features(
        tiny_config(), (40, 40)
    )
    assert supervised(encoded, processor) == ["<image> is a tag</s>"]
    assert "what does <image> mean?" in processor.tokenizer.decode(encoded.input_ids)


def test_a_processor_that_counts_otherwise_than_the_model_is_noticed() -> None:
    sample = Sample("x", conversation("a", "b", images=1), [picture(20, 20)])
    processor = processor_with("preset")
    processor.num_additional_image_tokens = 0
    reason = rejection(sample, processor=processor)
    assert reason.code == "placeholder_mismatch" and reason.detail.endswith("of images of (height, width) [(20, 20)]")


def test_a_damaged_image_is_named() -> None:
    sample = Sample("x", conversation("a", "b", images=1), [picture(50, 50)[:300]])
    assert rejection(sample).code.startswith("image_")


def test_a_conversation_that_the_template_refuses_is_left_out() -> None:
    """By an error of its own, or by writing this one's earlier turns differently: only the row is lost."""
    processor = processor_with("chatml")
    processor.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    system = [{"role": "system", "content": [{"type": "text", "text": "x"}]}, *conversation("a", "b")]
    reason = rejection(Sample("x", system, []), processor=processor)
    assert reason.code == "chat_template" and "no system" in reason.detail
    processor.chat_template = "{{ 'a' + 1 if messages[0]['role'] == 'system' }}" + CHATML
    assert rejection(Sample("x", system, []), processor=processor).code == "chat_template"
    processor.chat_template = CHATML.replace(
        "{{ part['text'] }}",
        "{{ part['text'].split('</think>')[-1] if not loop.last or message != messages[-1] else part['text'] }}",
    )
    check_template(processor)
    thinking = conversation("a", "<think>hm</think>b", "c", "d")
    assert rejection(Sample("x", thinking, []), processor=processor).code == "chat_template"
