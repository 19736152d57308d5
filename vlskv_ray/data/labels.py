"""The labels of a sample: which of its tokens are learnt, and whether a chat template lets them be placed."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlskv_ray.data.collate import IGNORE_INDEX
from vlskv_ray.data.sample import Rejected
from vlskv_ray.data.templates import render, spans_by_prefixes, write


def labels_of(
    input_ids: NDArray[np.int64], offsets: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.int64]:
    """`input_ids` where a token overlaps a span, IGNORE_INDEX elsewhere."""
    starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    ended, begun = np.searchsorted(ends, offsets[:, 0], "right"), np.searchsorted(starts, offsets[:, 1], "left")
    return np.where(begun > ended, input_ids, IGNORE_INDEX)


def check_template(processor: Any) -> list[str]:
    """Tries the processor's chat template on conversations as data have them.

    Returns:
        what a reader should know of it: which rows it does not take, and which it writes in another order.

    Raises:
        ValueError: labels cannot be placed with it.
    """
    if not processor.tokenizer.is_fast:
        kind = type(processor.tokenizer).__name__
        raise ValueError(
            f"the model's tokenizer ({kind}) does not say which characters a token is of, which labels need; "
            f"wanted one with a tokenizer.json"
        )
    turns = ("What is this?", "A circle.", "Which colour?", "Red.")
    try:
        messages = _conversation(*turns, images=1)
        spans_by_prefixes(processor, messages, write(processor, messages))
        rendering = render(processor, messages)
    except Rejected as reason:
        raise ValueError(reason.detail + _of_text_model(processor, turns)) from reason
    for (start, end), answer in zip(rendering.answers, turns[1::2], strict=True):
        if answer not in rendering.text[start:end]:
            shown = repr(rendering.text)
            raise ValueError(f"the model's chat template does not render an answer as given: {shown}")
    notices = []
    for what, messages in _less_usual(turns):
        try:
            rendering = render(processor, messages)
        except Rejected as reason:
            notices.append(f"rows with {what} will be left out: {reason.detail}")
            continue
        if rendering.moves_images:
            notices.append(f"rows with {what} are learnt as the model's chat template has them: the images first")
    return notices


def _of_text_model(processor: Any, turns: Sequence[str]) -> str:
    """What a template must take where it takes texts alone, as those of text models do."""
    texts = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    try:
        as_texts = write(processor, texts)
    except Rejected:
        return ""
    try:
        if write(processor, _conversation(*turns, images=0)) == as_texts:
            return ""  # it takes parts: something else is the matter
    except Rejected:
        pass
    return (
        f"; it is a text model's, which takes a message's content as one text. Wanted one that takes a list of parts, "
        f"such as {{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{processor.image_token}"
        f"{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}; `vlskv-ray assemble` makes one of it"
    )


def _less_usual(turns: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Conversations that not every template takes, and what they have."""
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    yield "a system turn", [system, *_conversation(*turns, images=1)]
    yield "several images", _conversation(*turns, images=2)
    between = _conversation(*turns, images=1)
    between[0]["content"].insert(0, {"type": "text", "text": "Look at this: "})
    yield "an image after a text", between


def _conversation(*turns: str, images: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [{"type": "image"} for _ in range(images)] + messages[0]["content"]
    return messages
