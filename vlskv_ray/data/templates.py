"""What a chat template makes of a conversation, and where in it the conversation's own texts, images and answers stand.

A template is asked twice whatever the conversation's length: with a mark in place of each text, which shows what the
template itself writes and in which order, and with the texts. Where the second is the first with the texts put in,
every place is known. Templates that make something else of a text are asked again and again, as `spans_by_prefixes`
has it.
"""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from vlskv_ray.data.sample import Rejected

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters [start, stop)."""

MARK = "\ue000{}\ue001"
"""Stands for a text, by its number: characters that no template writes of its own."""
MOST_RENDERED = 2**26
"""Characters that prefixes of a conversation may come to, a message counting as 100 at least: some seconds."""
TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
)
"""A template may compute anything."""
SHOWN = 60
REMEDY = (
    "put a template that does not into chat_template.jinja of a copy of the model's folder, and name that copy as "
    "model.name_or_path"
)


@dataclass(frozen=True)
class Rendering:
    """A conversation as its model reads it, images still one token each."""

    text: str
    answers: list[Span]
    """The assistant's turns up to the token that ends them, included: what a model writes; of one that was cut, its
    words alone."""
    texts: list[Span]
    """What is the conversation's own, in order."""
    images: list[Span]
    """The image tokens, in the order of the images."""
    is_exact: bool
    """Whether `texts` is known rather than searched for: then all else is the template's."""
    moves_images: bool
    """The template writes an image before or after a text where the conversation has it otherwise."""


@dataclass(frozen=True)
class Outline:
    """A conversation as the template writes it, without its texts and images."""

    literals: list[str]
    """What the template itself writes: before, between and after the marks."""
    marks: list[int | None]
    """What stands between them: a text, by its number, or an image."""


@dataclass(frozen=True)
class Manner:
    """How a template writes an assistant's turn, wherever in a conversation it is."""

    opening: str
    """Before the answer."""
    prompt: str
    """What opens a turn that is still to be written."""
    closing: str
    """After the answer."""


def render(processor: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendering:
    """The conversation as text, by the processor's chat template, and where in it what stands.

    Texts of a turn that follow one another are one text. A newline after an image is dropped where the template writes
    one itself. An answer ends with its stop token: what a template writes after that, such as the newline after
    `<|im_end|>`, no model generates. Where a template closes the last answer with no such token, the end-of-sequence
    token is added: a student must learn where to stop.

    Args:
        processor: a stock processor.
        messages: see `Sample`.
        add_generation_prompt: open an assistant's turn at the end; then there are no `answers`.

    Raises:
        Rejected: `chat_template` if the template refuses the conversation, does not write all its texts once and in
            order, or rewrites earlier turns as later ones come, so that no answer's place can be told;
            `marker_mismatch` if it does not write all images; `text_cap` if finding the places would take too long.
    """
    messages = [joined(message) for message in messages]
    options = {"add_generation_prompt": True} if add_generation_prompt else {}
    messages, outline = _without_doubled_newlines(processor, messages, options)
    texts = texts_of(messages)
    _check_order(outline.marks, messages, texts)
    text = write(processor, messages, **options)
    places = _place(text, outline, texts, processor.image_token)
    answers: list[Span] | None = None
    if add_generation_prompt:
        answers = []
    elif places is not None and (manner := manner_of(processor)) is not None:
        answers = spans_by_manner(manner, text, outline, places, messages)
    if answers is None:
        _check_cost(messages, text)
        answers = spans_by_prefixes(processor, messages, text)
    is_exact = places is not None
    if places is not None:
        own = [place for mark, place in zip(outline.marks, places, strict=True) if mark is not None]
        images = [place for mark, place in zip(outline.marks, places, strict=True) if mark is None]
    else:
        own = _search(text, texts)
        images = [match.span() for match in re.finditer(re.escape(processor.image_token), text)]
    if not add_generation_prompt:
        text, answers = _with_ends(processor.tokenizer, text, answers, own)
        known = dict(zip((mark for mark in outline.marks if mark is not None), own, strict=True)) if is_exact else {}
        answers = _without_ends_of_cut(text, answers, known, messages)
    in_order = [mark is None for mark in outline.marks]
    return Rendering(text, answers, own, images, is_exact, in_order != [text is None for text in _items(messages)])


def joined(message: Message) -> Message:
    """The message with one text part where several follow one another: many templates write only the first."""
    parts: list[dict[str, str]] = []
    for part in message["content"]:
        if parts and part["type"] == "text" == parts[-1]["type"]:
            parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
        else:
            parts.append(part)
    return {**message, "content": parts}


def texts_of(messages: Sequence[Message]) -> list[str]:
    return [text for text in _items(messages) if text is not None]


def _items(messages: Sequence[Message]) -> Iterator[str | None]:
    """All parts of a conversation: texts, and None for images."""
    for message in messages:
        for part in message["content"]:
            yield part["text"] if part["type"] == "text" else None


def write(processor: Any, messages: Sequence[Message], **options: Any) -> str:
    """What the template makes of the messages, of none: nothing. Rejected (`chat_template`) if it takes them not."""
    if not messages:
        return ""
    try:
        text: str = processor.apply_chat_template(list(messages), tokenize=False, **options)
    except TEMPLATE_ERRORS as error:
        asked = "question" if "add_generation_prompt" in options else "conversation"
        detail = f"the model's chat template does not take this {asked}: {' '.join(str(error).split())}"
        raise Rejected("chat_template", detail) from error
    return text


# ------------------------------------------------------------------------------------------- what the template writes
def outline_of(processor: Any, messages: Sequence[Message], **options: Any) -> Outline:
    """The conversation with a mark in place of each text, taken apart."""
    marked, number = [], 0
    for message in messages:
        parts = []
        for part in message["content"]:
            parts.append({"type": "text", "text": MARK.format(number)} if part["type"] == "text" else part)
            number += part["type"] == "text"
        marked.append({**message, "content": parts})
    a_mark = f"{MARK.format('([0-9]+)')}|{re.escape(processor.image_token)}"
    pieces = re.split(a_mark, write(processor, marked, **options))
    return Outline(pieces[::2], [None if mark is None else int(mark) for mark in pieces[1::2]])


def _without_doubled_newlines(
    processor: Any, messages: list[Message], options: dict[str, Any]
) -> tuple[list[Message], Outline]:
    """The messages, less a newline after an image where the template writes one there too, and their outline.

    Data that have images as marks in a text write `<image>\n` for what templates write as the same: one newline.
    """
    outline = outline_of(processor, messages, **options)
    after_marks = zip(outline.marks, outline.literals[1:], strict=True)
    follows = [after.startswith("\n") for mark, after in after_marks if mark is None]
    num_images = sum(text is None for text in _items(messages))
    if len(follows) != num_images:
        detail = f"the model's chat template writes {len(follows)} image tokens for {num_images} images"
        raise Rejected("marker_mismatch", detail)
    number, kept, num_parts = 0, [], 0
    for message in messages:
        parts: list[dict[str, str]] = []
        doubled = False
        for part in message["content"]:
            if part["type"] == "image":
                doubled, number = follows[number], number + 1
            elif doubled and part["text"].startswith("\n"):
                part = {"type": "text", "text": part["text"][1:]}
                if not part["text"]:
                    continue
            parts.append(part)
        num_parts += len(parts)
        kept.append({**message, "content": parts})
    is_same = num_parts == sum(len(message["content"]) for message in messages)
    return kept, outline if is_same else outline_of(processor, kept, **options)


def _check_order(marks: Sequence[int | None], messages: Sequence[Message], texts: Sequence[str]) -> None:
    """Rejected if the template does not write every text once, and all in the order of the conversation."""
    written = [mark for mark in marks if mark is not None]
    if written == list(range(len(texts))):
        return
    times = Counter(written)
    for number, text in enumerate(texts):
        if times[number] != 1 and (times[number] or text.strip()):
            how = f"{times[number]} times" if times[number] else "not at all"
            raise _loss(f"writes the text {_shown(text)} of {_turn(messages, number)} {how}")
    written = [number for number in written if texts[number].strip()]
    moved = next((a for a, b in zip(written, written[1:], strict=False) if a > b), None)
    if moved is not None:
        raise _loss(f"writes the text {_shown(texts[moved])} of {_turn(messages, moved)} after what follows it")


def _loss(what: str) -> Rejected:
    return Rejected("chat_template", f"the model's chat template {what}; leave such rows out, or {REMEDY}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _turn(messages: Sequence[Message], number: int) -> str:
    """Whose text of that number is, for a reader."""
    owners = [i for i, message in enumerate(messages) for part in message["content"] if part["type"] == "text"]
    return f"message {owners[number] + 1} ({messages[owners[number]]['role']})"


def _place(text: str, outline: Outline, texts: Sequence[str], image_token: str) -> list[Span] | None:
    """Where each mark's text or image stands in the rendering; None if that is not the outline with texts put in.

    Some templates strip white space off a text's ends; what is left is all that the row says.
    """
    if not text.startswith(outline.literals[0]):
        return None
    at, places = len(outline.literals[0]), []
    for mark, after in zip(outline.marks, outline.literals[1:], strict=True):
        for form in (image_token,) if mark is None else _forms(texts[mark]):
            if text.startswith(form, at) and text.startswith(after, at + len(form)):
                break
        else:
            return None
        places.append((at, at + len(form)))
        at += len(form) + len(after)
    return places if at == len(text) else None


def _forms(text: str) -> Iterator[str]:
    yield text
    yield text.strip()
    yield text.lstrip()
    yield text.rstrip()


def _search(text: str, texts: Sequence[str]) -> list[Span]:
    """Where texts first stand in the rendering, each after the one before: for what changes texts, so that no more is
    known. What is found may be the template's own. Rejected (`chat_template`) if one is missing.
    """
    at, places = 0, []
    for number, own in enumerate(texts):
        own = own.strip()
        start = text.find(own, at)
        if start < 0:
            raise _loss(f"writes {_shown(own)}, text {number + 1} of the conversation, otherwise than the row has it")
        at = start + len(own)
        places.append((start, at))
    return places


# --------------------------------------------------------------------------------------------------- where answers are
def spans_by_manner(
    manner: Manner, text: str, outline: Outline, places: Sequence[Span], messages: Sequence[Message]
) -> list[Span] | None:
    """The assistant's turns, as `spans_by_prefixes` has them; None if the template writes one in another manner."""
    of_mark = {mark: i for i, mark in enumerate(outline.marks) if mark is not None}
    spans, number = [], 0
    for message in messages:
        if message["role"] != "assistant":
            number += sum(part["type"] == "text" for part in message["content"])
            continue
        if (i := of_mark.get(number)) is None:
            return None
        before, after = outline.literals[i], outline.literals[i + 1]
        if not before.endswith(manner.opening) or not after.startswith(manner.closing):
            return None
        if message is messages[-1] and after != manner.closing:
            return None
        number += 1
        start = places[i][0] - len(manner.opening)
        opened = os.path.commonprefix([text[start : start + len(manner.prompt)], manner.prompt])
        spans.append((start + len(opened), places[i][1] + len(manner.closing)))
    return spans


def spans_by_prefixes(processor: Any, messages: Sequence[Message], text: str) -> list[Span]:
    """The assistant's turns, from what the template makes of the messages before each, and up to it.

    Turn i begins where the text of the messages before it ends (after the words that open an assistant's turn) and ends
    where the text of the messages up to it does.

    Args:
        text: what the template makes of all the messages.

    Raises:
        Rejected: `chat_template`: the template rewrites earlier turns as later ones come, so that no span can be told.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, upto = write(processor, messages[:i]), write(processor, messages[: i + 1])
        opened = write(processor, messages[:i], add_generation_prompt=True)
        if not text.startswith(upto) or not upto.startswith(before):
            raise Rejected(
                "chat_template",
                f"the model's chat template writes message {i + 1} of a conversation differently once others follow "
                f"({upto[-80:]!r} is not the beginning of the whole); labels cannot be placed with such a template: "
                f"{REMEDY}",
            )
        spans.append((max(len(before), len(os.path.commonprefix([text, opened]))), len(upto)))
    return spans


def _check_cost(messages: Sequence[Message], text: str) -> None:
    """Rejected (`text_cap`) if prefixes of this conversation would take too long to render."""
    count = 3 * sum(message["role"] == "assistant" for message in messages)
    if count * (len(text) + 100 * len(messages)) > MOST_RENDERED:
        raise Rejected(
            "text_cap",
            f"{len(messages)} messages of {len(text)} characters are too many to find the answers in, with a chat "
            f"template that does not write all turns and texts alike; split the conversation",
        )


def manner_of(processor: Any) -> Manner | None:
    """How the processor's template writes an assistant's turn; None if not the same wherever it is."""
    return _manner(processor, str(processor.chat_template))


@lru_cache(maxsize=8)
def _manner(processor: Any, chat_template: str) -> Manner | None:
    """Learnt from one turn, and tried on three: with and without a system turn and images."""
    asked, answered = (_probe(1)[:count] for count in (1, 2))
    try:
        before, after = outline_of(processor, asked), outline_of(processor, answered)
        opened = outline_of(processor, asked, add_generation_prompt=True)
    except Rejected:
        return None
    if (before.marks, after.marks, opened.marks) != ([0], [0, 1], [0]):
        return None
    if not after.literals[1].startswith(before.literals[1]):
        return None
    asks = opened.literals[0] == before.literals[0] and opened.literals[1].startswith(before.literals[1])
    prompt = opened.literals[1].removeprefix(before.literals[1]) if asks else ""
    manner = Manner(after.literals[1].removeprefix(before.literals[1]), prompt, after.literals[2])
    return manner if all(_agrees(processor, manner, messages) for messages in probes()) else None


def _agrees(processor: Any, manner: Manner, messages: list[Message]) -> bool:
    """Whether spans by this manner are those by prefixes, or the template does not take such a conversation at all."""
    try:
        text, outline = write(processor, messages), outline_of(processor, messages)
    except Rejected:
        return True
    places = _place(text, outline, texts_of(messages), processor.image_token)
    try:
        wanted = spans_by_prefixes(processor, messages, text)
    except Rejected:
        return False
    return places is not None and spans_by_manner(manner, text, outline, places, messages) == wanted


def probes() -> Iterator[list[Message]]:
    """Conversations that a template should take: of three turns, with and without a system turn and images."""
    for num_images in (0, 1, 2):
        yield _probe(3, num_images)
        yield _probe(3, num_images, system=True)


def _probe(num_turns: int, num_images: int = 0, *, system: bool = False) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}] if system else []
    for turn in range(num_turns):
        question, answer = f"Which colour has number {turn + 1}?", f"Number {turn + 1} is red."
        images = [{"type": "image"}] * num_images if turn == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _without_ends_of_cut(
    text: str, answers: list[Span], known: dict[int, Span], messages: Sequence[Message]
) -> list[Span]:
    """The answers, of which those that were cut end with their words: nobody is to learn to stop there.

    Args:
        text: the rendering.
        answers: of all of the assistant's turns.
        known: where texts of the conversation stand, by their numbers; nothing where that is not known.
        messages: of the conversation.
    """
    ended: list[Span] = []
    number = -1
    for message in messages:
        texts = texts_of([message])
        number += len(texts)
        if message["role"] != "assistant":
            continue
        start, stop = answers[len(ended)]
        if message.get("cut"):
            words = texts[-1].strip()
            at = text.find(words, start, stop)
            if number not in known and at < 0:
                raise _loss(f"writes {_shown(words)} otherwise than the row has it")
            stop = known[number][1] if number in known else at + len(words)
        ended.append((start, stop))
    return ended


def _with_ends(tokenizer: Any, text: str, answers: Sequence[Span], own: Sequence[Span]) -> tuple[str, list[Span]]:
    """With answers that end with their stop tokens; the end-of-sequence token is added after a last one that has none.

    A stop token is the first special token after an answer's words, be it the tokenizer's end of sequence or not. Added
    tokens that are not special may be markup of the answer: of those the last one counts, where there is no other.

    Args:
        tokenizer: the model's.
        text: what the template makes of the conversation.
        answers: the assistant's turns, with all that the template writes to close them.
        own: the texts of the conversation.
    """
    special = set(tokenizer.all_special_tokens)
    of_special, of_added = _any_of(special), _any_of(set(tokenizer.get_added_vocab()) - special)
    ends_of_words, spans, stops = [end for _, end in own], [], []
    for start, end in answers:
        words_end = max(start, ends_of_words[bisect_right(ends_of_words, end) - 1])
        stops = [*of_special.finditer(text, words_end, end)][:1] or [*of_added.finditer(text, words_end, end)][-1:]
        spans.append((start, stops[0].end() if stops else end))
    if not stops and tokenizer.eos_token and answers[-1][1] == len(text):
        text += tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the first of these names, the longest that fits; never runs of spaces, which end nothing."""
    longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
