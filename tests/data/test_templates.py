"""All that a row says stands in what its model reads, once and in order, or the row is left out and says why."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import conversation, picture, tiny_config
from reference import rendered_by_prefixes
from templates import HUB_MISTRAL
from tokenizers.processors import TemplateProcessing

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import IGNORE_INDEX
from vlskv_ray.data.labels import check_template
from vlskv_ray.data.rows import sample_of
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.templates import Rendering, render
from vlskv_ray.model import presets

PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IN_BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token }}[INST] " + PARTS + " [/INST]"
    "{% elif message['role'] == 'assistant' %} "
    + PARTS
    + " {{ eos_token }}{% else %}"
    + PARTS
    + "{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TRIMMING = CHATML.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
SYSTEM_IN_USER = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'][0]['text'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}[INST] {% if loop.first and system %}<<SYS>>"
    "{{ system }}<</SYS>>{% endif %}" + PARTS + " [/INST]{% else %}" + PARTS + "{{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
TEMPLATES = {
    "preset": presets.CHAT_TEMPLATE,
    "chatml": CHATML,
    "in brackets": IN_BRACKETS,
    "vicuna": VICUNA,
    "of the hub": HUB_MISTRAL,
    "trimming": TRIMMING,
    "system in user": SYSTEM_IN_USER,
    "default system": DEFAULT_SYSTEM,
    "end only between": CHATML.replace("<|im_end|>\n", "<|im_end|>{% if not loop.last %}\n{% endif %}"),
    "prompt that thinks": CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"),
    "one end otherwise": CHATML.replace("<|im_end|>\n", "<|im_end|>{{ loop.index if loop.index > 2 }}\n"),
}
THINKING = CHATML.replace(
    "{{ part['text'] }}",
    "{{ part['text'].split('</think>')[-1] if message != messages[-1] else part['text'] }}",
)


@functools.cache
def processor_with(template: str) -> Any:
    processor = presets.llava_next_processor(tiny_config())
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    processor.chat_template = template
    return processor


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def with_system(messages: list[dict[str, Any]], *texts: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": list(map(text_part, texts))}, *messages]


def said(rendering: Rendering) -> list[str]:
    return [rendering.text[start:stop] for start, stop in rendering.texts]


def learnt(processor: Any, row: dict[str, Any], root: Path | None = None) -> str:
    """The supervised words of a row."""
    encoded = encode(sample_of("x", row, root), processor, tiny_config(), Limits())
    text: str = processor.tokenizer.decode(encoded.input_ids[encoded.labels != IGNORE_INDEX])
    return text


def rejection(processor: Any, messages: list[dict[str, Any]], limits: Limits = Limits()) -> Rejected:  # noqa: B008
    with pytest.raises(Rejected) as reason:
        encode(Sample("x", messages, []), processor, tiny_config(), limits)
    return reason.value


# -------------------------------------------------------------------------------------------------------- where it is
WORDS = (
    "a",
    "red cat",
    " ",
    "\n",
    "ASSISTANT:",
    "[/INST]",
    "<think>",
    "é",
    "No.",
    "  indented",
    "\t",
    "assistant\n",
    "User: ",
)


def some_text(rng: np.random.Generator, *, empty: bool) -> str:
    while True:
        text = "".join(rng.choice(WORDS, size=rng.integers(0 if empty else 1, 5)))
        if empty or text.strip():
            return text


def some_conversation(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Up to four turns, perhaps with a system turn, images anywhere in user turns; no newline after an image."""
    messages: list[dict[str, Any]] = []
    for _ in range(rng.integers(1, 5)):
        user: list[dict[str, str]] = []
        for kind in rng.permutation(["image"] * rng.integers(0, 3) + ["text"] * rng.integers(1, 3)):
            of_text = user and user[-1]["type"] == "text"
            text = some_text(rng, empty=True)
            if kind == "image":
                user.append({"type": "image"})
            elif not of_text:
                user.append(text_part(text.lstrip("\n") if user else text))
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": [text_part(some_text(rng, empty=False))]})
    return with_system(messages, some_text(rng, empty=False)) if rng.random() < 0.3 else messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_answers_are_those_of_rendering_every_prefix(name: str) -> None:
    """100 random conversations by each template: the same characters, the same spans."""
    processor, rng = processor_with(TEMPLATES[name]), np.random.default_rng(5)
    for _ in range(100):
        messages = some_conversation(rng)
        rendering = render(processor, messages)
        assert (rendering.text, rendering.answers) == rendered_by_prefixes(processor, messages)
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        wanted = [text.strip() for text in texts] if name == "trimming" else texts
        assert (
            rendering.is_exact and [text.strip() if name == "trimming" else text for text in said(rendering)] == wanted
        )
        images = [part for message in messages for part in message["content"] if part["type"] == "image"]
        assert [rendering.text[start:stop] for start, stop in rendering.images] == ["<image>"] * len(images)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "one end otherwise"])
def test_a_conversation_is_rendered_twice_however_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its text goes through the tokenizer once: characters rendered and tokenised grow as the conversation does."""
    processor = processor_with(TEMPLATES[name])
    encode(Sample("x", conversation("a?", "b"), []), processor, tiny_config(), Limits())  # its manner is learnt once
    rendered, tokenised = counted_calls(processor, monkeypatch)
    for turns in (1, 30, 300):
        rendered.clear(), tokenised.clear()
        messages = conversation(*["what is it?", "a cat"] * turns)
        encode(Sample("x", messages, []), processor, tiny_config(), Limits(max_length=2**20))
        assert rendered == [len(messages)] * 2 and len(tokenised) == 1


def counted_calls(processor: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """The messages of each rendering and the characters of each tokenising from now on."""
    rendered: list[int] = []
    tokenised: list[int] = []
    stock_render, stock_tokenise = type(processor).apply_chat_template, type(processor.tokenizer).__call__

    def apply_chat_template(self: Any, messages: list[Any], *arguments: Any, **options: Any) -> Any:
        rendered.append(len(messages))
        return stock_render(self, messages, *arguments, **options)

    def call(self: Any, text: str, *arguments: Any, **options: Any) -> Any:
        tokenised.append(len(text))
        return stock_tokenise(self, text, *arguments, **options)

    monkeypatch.setattr(type(processor), "apply_chat_template", apply_chat_template)
    monkeypatch.setattr(type(processor.tokenizer), "__call__", call)
    return rendered, tokenised


# ---------------------------------------------------------------------------------------------------- nothing is lost
@pytest.fixture
def cases(tmp_path: Path) -> tuple[list[dict[str, Any]], Path]:
    """Rows in which templates as public models have them lose words, and the folder of their picture."""
    (tmp_path / "g.png").write_bytes(picture(40, 40))
    two_parts = [text_part("First half, "), text_part("second half.")]
    system = [text_part("Be kind. "), text_part("Answer in one word.")]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [text_part("Say.")]}, {"role": "assistant", "content": two_parts}]},
        {"messages": [{"role": "system", "content": system}, *as_strings("Say.", "Hi.")]},
        {"messages": as_strings("Left: <image> Right: <image> Which is red?", "Left."), "images": ["g.png"] * 2},
        {"messages": as_strings("<image>\nWhat?", "A cat."), "images": ["g.png"]},
    ]
    return rows, tmp_path


def as_strings(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_parts_of_a_turn_are_read_and_learnt(name: str, cases: tuple[list[dict[str, Any]], Path]) -> None:
    rows, root = cases
    processor = processor_with(TEMPLATES[name])
    assert "First half, second half." in learnt(processor, rows[0])
    encoded = encode(sample_of("x", rows[1], root), processor, tiny_config(), Limits())
    assert "Be kind. Answer in one word." in processor.tokenizer.decode(encoded.input_ids)
    assert "one word" not in learnt(processor, rows[1])


def test_images_stay_where_the_row_has_them_or_it_is_told_once(cases: tuple[list[dict[str, Any]], Path]) -> None:
    rows, root = cases
    messages = sample_of("x", rows[2], root).messages
    in_order, first = (render(processor_with(template), messages) for template in (CHATML, HUB_MISTRAL))
    assert "Left: <image>\n Right: <image>\n Which is red?" in in_order.text and not in_order.moves_images
    assert "[INST] <image>\n<image>\nLeft:  Right:  Which is red?" in first.text and first.moves_images
    assert check_template(processor_with(CHATML)) == []
    (notice,) = check_template(processor_with(HUB_MISTRAL))
    assert "an image after a text" in notice and "the images first" in notice


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_newline_after_an_image(name: str, cases: tuple[list[dict[str, Any]], Path]) -> None:
    """The one of `<image>\\n` in data is the one of `<image>\\n` in templates; further ones are the row's own."""
    rows, root = cases
    assert "<image>\nWhat?" in render(processor_with(TEMPLATES[name]), sample_of("x", rows[3], root).messages).text
    rows[3]["messages"][0]["content"] = "<image>\n\nWhat?"
    spaced = render(processor_with(TEMPLATES[name]), sample_of("x", rows[3], root).messages).text
    assert ("<image>\nWhat?" if name == "trimming" else "<image>\n\nWhat?") in spaced
    rows[3] |= {"messages": as_strings("<image>\n<image>\nWhat?", "A cat."), "images": ["g.png"] * 2}
    both = render(processor_with(TEMPLATES[name]), sample_of("x", rows[3], root).messages).text
    assert "<image>\n<image>\nWhat?" in both


def test_a_newline_that_the_template_does_not_write_stays() -> None:
    messages = conversation("\nWhat?", "A cat.", images=1)
    assert "<image>\nWhat?" in render(processor_with(CHATML.replace("<image>\n", "<image>")), messages).text


TEXT = "{{ part['text'] }}"
NO_SYSTEM = CHATML.replace("<|im_start|>{{", "{% if message['role'] != 'system' %}<|im_start|>{{")
TURNS_FIRST = "{% for m in messages if m['role'] != 'system' %}{{ m['content'][0]['text'] }}{% endfor %}"
LOSSES = {
    "no system turn": (
        NO_SYSTEM.replace("<|im_end|>\n", "<|im_end|>\n{% endif %}"),
        "'Be brief.' of message 1 (system)",
    ),
    "a text twice": (CHATML.replace(TEXT, TEXT + "{{ part['text'] if message['role'] == 'user' }}"), "(user) 2 times"),
    "system turn last": (TURNS_FIRST + "{{ messages[0]['content'][0]['text'] }}", "'This one.' of message 3"),
    "words taken out": (CHATML.replace(TEXT, "{{ part['text'] | replace('Which', '') }}"), "'Which is it?'"),
    "words in capitals": (CHATML.replace(TEXT, "{{ part['text'] | upper }}"), "'Be brief.'"),
}


@pytest.mark.parametrize(("template", "told"), LOSSES.values(), ids=LOSSES.keys())
def test_a_row_that_a_template_does_not_write_as_it_is_is_left_out(template: str, told: str) -> None:
    """With what is lost, and what to do."""
    messages = with_system(conversation("Which is it?", "This one."), "Be brief.")
    reason = rejection(processor_with(template), messages)
    assert reason.code == "chat_template" and told in reason.detail
    assert "chat_template.jinja" in reason.detail and "\n" not in reason.detail


def test_a_text_after_an_image_is_not_lost() -> None:
    """By a template that writes of a turn's texts the first one only."""
    first_only = "{% for p in message['content'] if p['type'] == 'image' %}<image>\n{% endfor %}" + (
        "{{ (message['content'] | selectattr('type', 'equalto', 'text') | list)[0]['text'] }}"
    )
    messages = conversation("What is this?", "A cat.")
    messages[0]["content"] += [{"type": "image"}, text_part(" and this?")]
    with pytest.raises(Rejected, match="' and this\\?' of message 1 .user. not at all"):
        render(processor_with(CHATML.replace(PARTS, first_only)), messages)


def test_check_template_tells_of_rows_that_it_does_not_take() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    (notice,) = check_template(processor_with(refusing))
    assert notice.startswith("rows with a system turn will be left out: ") and "no system role" in notice
    one_image = CHATML.replace(PARTS, PARTS.replace("<image>\n", "{{ '<image>\n' if loop.first }}"))
    assert any(
        notice.startswith("rows with several images will be left out: ")
        for notice in check_template(processor_with(one_image))
    )


@pytest.mark.parametrize(
    "template", [THINKING.replace("</think>", "c"), CHATML.replace(PARTS, "{{ message['content'] }}")]
)
def test_check_template_says_what_the_template_does_not_take(template: str) -> None:
    with pytest.raises(ValueError, match="^the model's chat template"):
        check_template(processor_with(template))


def test_a_template_that_drops_earlier_thoughts_says_what_to_do() -> None:
    reason = rejection(processor_with(THINKING), conversation("a", "<think>hm</think>b", "c", "d"))
    assert reason.code == "chat_template" and "chat_template.jinja of a copy of the model's folder" in reason.detail


BEGINS = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


@pytest.mark.parametrize("before", ["", "\n", " \n"])
def test_one_token_begins_a_sequence(before: str) -> None:
    """White space before the one that a template writes does not bring a second."""
    processor = processor_with("{{ '" + before.replace("\n", "\\n") + "' }}" + presets.CHAT_TEMPLATE)
    processor.tokenizer.backend_tokenizer.post_processor = BEGINS
    encoded = encode(Sample("x", conversation("a?", "b"), []), processor, tiny_config(), Limits())
    assert (encoded.input_ids == processor.tokenizer.bos_token_id).sum() == 1


# ------------------------------------------------------------------------------------------------------- much of it
def test_more_messages_than_tokens_are_left_out_before_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = processor_with(CHATML)
    rendered, tokenised = counted_calls(processor, monkeypatch)
    reason = rejection(processor, conversation(*["a", "b"] * 2000))
    assert (reason.code, rendered, tokenised) == ("text_cap", [], [])
    assert "4000 messages" in reason.detail and "data.max_length=2048" in reason.detail


def test_a_text_that_no_tokenizer_makes_short_enough_is_left_out_before_rendering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = processor_with(CHATML)
    rendered, tokenised = counted_calls(processor, monkeypatch)
    for question, answer in (("a" * 5 * 2**20, "b"), ("a", "many words " * 2**19), ("a", "b" + "\t" * 5 * 2**20 + "b")):
        reason = rejection(processor, conversation(question, answer))
        assert (reason.code, rendered, tokenised) == ("text_cap", [], [])
        assert "tokens at least" in reason.detail and "data.max_length=2048" in reason.detail


def test_a_long_text_that_fits_is_not_left_out() -> None:
    """Words of one token each, the longest of the vocabulary: the cap falls beyond what fits."""
    processor = presets.llava_next_processor(presets.PRESETS["shapes-llava-next"].config())
    longest = max((word for word in presets.WORDS if f"Ġ{word}" in processor.tokenizer.get_vocab()), key=len)
    sample = Sample("x", conversation("a", f" {longest}" * 2000), [])
    assert len(encode(sample, processor, tiny_config(), Limits(max_length=2048)).input_ids) < 2048


def test_a_template_that_must_be_rendered_prefix_by_prefix_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are used up to some length, beyond which they are left out rather than waited for."""
    processor = processor_with(TEMPLATES["one end otherwise"])
    messages = conversation(*["a", "b"] * 100)
    assert render(processor, messages).answers == rendered_by_prefixes(processor, messages)[1]
    rendered, _ = counted_calls(processor, monkeypatch)
    reason = rejection(processor, conversation(*["a", "b"] * 2000), Limits(max_length=2**20))
    assert reason.code == "text_cap" and len(rendered) <= 2 and "split the conversation" in reason.detail


def test_spaces_that_are_added_tokens_end_no_answer() -> None:
    processor = presets.llava_next_processor(tiny_config())
    processor.tokenizer.add_tokens([" ", "  "])
    processor.chat_template = VICUNA
    rendering = render(processor, conversation("What?", "A cat."))
    assert rendering.text[slice(*rendering.answers[0])] == " A cat. </s>"


@pytest.mark.parametrize("template", ["system in user", "of the hub", "chatml"])
def test_an_empty_system_turn_is_taken(template: str) -> None:
    """Many sets have one in every row."""
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A cat."},
        ]
    }
    assert learnt(processor_with(TEMPLATES[template]), row).strip().startswith("A cat.")
