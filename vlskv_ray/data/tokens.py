"""From a rendered conversation to token ids, in which a text never holds a token that only a template may write.

Control tokens are those that steer a model: `</s>`, `<image>`, `<|im_start|>`. A tokenizer takes their characters for
the token wherever they stand, in what a user or an assistant said as well; there they are characters.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from vlskv_ray.data.sample import Rejected
from vlskv_ray.data.templates import Rendering, Span, outline_of, probes, write

STAND_INS = 0xF1000
"""The first of the private-use characters that stand for control tokens where texts hold control tokens' names."""
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Control:
    """The control tokens of a tokenizer and a template."""

    stand_ins: dict[str, str]
    """A private-use character each, by name."""
    ids: dict[str, int]
    """By stand-in."""
    pattern: re.Pattern[str]
    """Any of the names, the longest that fits."""
    is_one: NDArray[np.bool_]
    """By id; one more at the end for all further ids."""


def tokenise(processor: Any, rendering: Rendering, placeholders: Sequence[str]) -> tuple[Ids, Ids, list[Span]]:
    """The ids of a rendering whose images are expanded.

    Args:
        processor: the stock processor that the rendering was made with.
        rendering: see `render`.
        placeholders: what stands for each image, image tokens only.

    Returns:
        int64[T] ids, int64[T, 2] the characters that each is of, and the spans of the answers in the same characters.

    Raises:
        Rejected: `text_special`: a text holds a control token's name, and this tokenizer cannot tell it from the token.
    """
    tokenizer, control = processor.tokenizer, control_tokens(processor)
    if not rendering.is_exact:
        for start, stop in rendering.texts:
            if match := control.pattern.search(rendering.text, start, stop):
                raise _inseparable(match[0], "the chat template changes texts, or looks at what they hold")
    add_special_tokens = not begins_itself(tokenizer, rendering)
    text, moved = _replaced(rendering.text, zip(rendering.images, placeholders, strict=True))
    encoding = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, offsets = _arrays(encoding["input_ids"], encoding["offset_mapping"])
    own = [(moved(start), moved(stop)) for start, stop in rendering.texts]
    if name := _name_in_texts(control, tokenizer, text, (ids, offsets), own):
        ids, offsets, moved = _tokenise_apart(processor, rendering, placeholders, add_special_tokens, name)
    return ids, offsets, [(moved(start), moved(stop)) for start, stop in rendering.answers]


def begins_itself(tokenizer: Any, rendering: Rendering) -> bool:
    """Whether the template writes the token that begins a sequence, be it after white space: then it is not added."""
    first = min([start for start, _ in (*rendering.texts, *rendering.images)], default=len(rendering.text))
    return bool(tokenizer.bos_token) and rendering.text[:first].lstrip().startswith(tokenizer.bos_token)


def _replaced(text: str, replacements: Iterable[tuple[Span, str]]) -> tuple[str, Callable[[int], int]]:
    """The text with other words at some places, which are in order, and where a position outside of them comes to."""
    pieces, at, ends, gains, gained = [], 0, [], [0], 0
    for (start, end), new in replacements:
        pieces += [text[at:start], new]
        at, gained = end, gained + len(new) - (end - start)
        ends.append(end)
        gains.append(gained)
    return "".join([*pieces, text[at:]]), lambda position: position + gains[bisect_right(ends, position)]


def _arrays(ids: Sequence[int], offsets: Sequence[Span]) -> tuple[Ids, Ids]:
    return np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------------ control tokens
def control_tokens(processor: Any) -> Control:
    """Special tokens, the image token, and what the template itself writes of other added tokens but white space.

    Added tokens that no template writes are words like others: runs of spaces, names of a domain.
    """
    return _control(processor, str(processor.chat_template), len(processor.tokenizer))


@lru_cache(maxsize=8)
def _control(processor: Any, chat_template: str, num_tokens: int) -> Control:
    written = "\0".join(_written(processor))
    names = {processor.image_token_id: processor.image_token}
    for number, token in processor.tokenizer.added_tokens_decoder.items():
        if token.special or (token.content in written and not token.content.isspace()):
            names[number] = token.content
    longest_first = sorted(names.values(), key=len, reverse=True)
    is_one = np.zeros(max(names) + 2, dtype=bool)
    is_one[list(names)] = True
    stand_ins = {name: chr(STAND_INS + i) for i, name in enumerate(longest_first)}
    ids = {stand_ins[name]: number for number, name in names.items()}
    return Control(stand_ins, ids, re.compile("|".join(map(re.escape, longest_first))), is_one)


def _written(processor: Any) -> Iterator[str]:
    """What the template writes beside texts, tried on some conversations."""
    for messages in probes():
        for ask in (False, True):
            asked = messages[:-1] if ask else messages
            try:
                yield from outline_of(processor, asked, add_generation_prompt=ask).literals
            except Rejected:
                continue


def _name_in_texts(
    control: Control, tokenizer: Any, text: str, tokens: tuple[Ids, Ids], own: Sequence[Span]
) -> str | None:
    """What of the conversation's own texts has become a control token; None: nothing."""
    ids, offsets = tokens
    at = np.flatnonzero(control.is_one[np.minimum(ids, len(control.is_one) - 1)])
    if not len(at) or not own:
        return None
    starts, stops = np.asarray(own).T
    near = np.searchsorted(stops, offsets[at, 0], "right") < np.searchsorted(starts, offsets[at, 1], "left")
    for i in at[near].tolist():
        start, stop = offsets[i].tolist()
        name = text[start:stop]  # with white space around it, which some tokens take in
        start, stop = start + len(name) - len(name.lstrip()), stop - len(name) + len(name.rstrip())
        is_unknown = ids[i] == tokenizer.unk_token_id and name.strip() != tokenizer.unk_token
        if not is_unknown and np.searchsorted(stops, start, "right") < np.searchsorted(starts, stop, "left"):
            return name.strip()
    return None


# ------------------------------------------------------------------------------------------------ names that stay text
def _tokenise_apart(
    processor: Any, rendering: Rendering, placeholders: Sequence[str], add_special_tokens: bool, name: str
) -> tuple[Ids, Ids, Callable[[int], int]]:
    """Ids, their characters, and where a position of the rendering is among these.

    The template's control tokens are written as stand-ins, which is what a copy of the tokenizer calls them; their
    names, which only texts hold then, mean nothing to it. All else it does as the tokenizer does.
    """
    control = control_tokens(processor)
    copy = _with_stand_ins(processor, str(processor.chat_template), len(processor.tokenizer))
    if copy is None:
        raise _inseparable(name, "a copy of it without that name works otherwise")
    if any(character in rendering.text for character in control.stand_ins.values()):
        raise _inseparable(name, f"the conversation also holds a private-use character from U+{STAND_INS:X} on")
    image = control.stand_ins[processor.image_token]
    images = dict(zip(rendering.images, placeholders, strict=True))
    replacements, at = [], 0
    for span in [*sorted([*rendering.texts, *rendering.images]), (len(rendering.text),) * 2]:
        for match in control.pattern.finditer(rendering.text, at, span[0]):
            replacements.append((match.span(), control.stand_ins[match[0]]))
        if span in images:
            replacements.append((span, images[span].replace(processor.image_token, image)))
        at = span[1]
    text, moved = _replaced(rendering.text, replacements)
    encoding = copy.encode(text, add_special_tokens=add_special_tokens)
    ids, offsets = _arrays(encoding.ids, encoding.offsets)
    unknown = processor.tokenizer.unk_token_id
    is_control = control.is_one[np.minimum(ids, len(control.is_one) - 1)] & (offsets[:, 1] > offsets[:, 0])
    wanted = [control.ids[character] for _, new in replacements for character in new if character in control.ids]
    if ids[is_control & (ids != unknown)].tolist() != [number for number in wanted if number != unknown]:
        raise _inseparable(name, "it makes the token of its characters in other ways too")
    return ids, offsets, moved


@lru_cache(maxsize=2)
def _with_stand_ins(processor: Any, chat_template: str, num_tokens: int) -> Tokenizer | None:
    """A copy of the tokenizer that calls control tokens by their stand-ins; None if it works otherwise than before."""
    control, tokenizer = _control(processor, chat_template, num_tokens), processor.tokenizer
    named = control.stand_ins
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = named.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {named.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[named.get(token, token), score] for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = named.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # of characters to a name
        prefix = len(model["continuing_subword_prefix"] or "")
        model["merges"] = [(a, b) for a, b in model["merges"] if not named.keys() & {a, b, a + b[prefix:]}]
    copy = Tokenizer.from_str(json.dumps(state))
    if any(copy.token_to_id(character) != number for character, number in control.ids.items()):
        return None
    for messages in probes():
        try:
            text = write(processor, messages)
        except Rejected:
            continue
        as_copied = control.pattern.sub(lambda match: named[match[0]], text)
        if copy.encode(as_copied, add_special_tokens=True).ids != tokenizer(text)["input_ids"]:
            return None
    return copy


def _inseparable(name: str, why: str) -> Rejected:
    detail = f"a text holds {name!r}, which the model's tokenizer cannot be kept from taking for that token: {why}"
    return Rejected("text_special", detail)


# ------------------------------------------------------------------------------------------------------ how many tokens
MOST_COMPOSED = 4
"""Characters that Unicode's composed forms make one of, at most."""


def fewest_tokens(tokenizer: Any, texts: Iterable[str]) -> int:
    """How many tokens texts come to at least, without tokenising them; 0 where the tokenizer has no such bound."""
    longest = _longest_token(tokenizer, len(tokenizer))
    return 0 if longest is None else sum(len(text.strip()) for text in texts) // longest


@lru_cache(maxsize=2)
def _longest_token(tokenizer: Any, num_tokens: int) -> int | None:
    """Of how many characters of a text a token can be, at most; None where that has no end.

    It has none where characters are dropped, or unknown ones made one token however many they are.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splits = state["model"], _flat(state["pre_tokenizer"], "pretokenizers")
    kinds = {split["type"] for split in splits} | {norm["type"] for norm in _flat(state["normalizer"], "normalizers")}
    vocabulary = tokenizer.get_vocab()
    if "ByteLevel" in kinds:
        alphabet = ByteLevel.alphabet()
    elif model.get("byte_fallback"):
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        return None
    drops = any(split.get("behavior") == "Removed" for split in splits)
    if model["type"] not in ("BPE", "Unigram") or drops or not vocabulary.keys() >= set(alphabet):
        return None
    if not {split["type"] for split in splits} <= {"ByteLevel", "Metaspace", "Digits", "Split"}:
        return None
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"] if not token["special"]):
        return None
    longest = max(map(len, vocabulary))
    for normalizer in _flat(state["normalizer"], "normalizers"):
        shrinks = _shrinks(normalizer)
        if shrinks is None:
            return None
        longest *= shrinks
    return longest


def _flat(part: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    if part is None:
        return []
    return [step for inner in part[parts] for step in _flat(inner, parts)] if part["type"] == "Sequence" else [part]


def _shrinks(normalizer: dict[str, Any]) -> int | None:
    """How many characters a normalizer makes one of, at most; None where that has no end."""
    kind = normalizer["type"]
    if kind in ("NFC", "NFKC"):
        return MOST_COMPOSED
    if kind == "Replace" and "String" in normalizer["pattern"] and normalizer["content"]:
        return -(-len(normalizer["pattern"]["String"]) // len(normalizer["content"]))
    return 1 if kind in ("NFD", "NFKD", "Prepend", "Lowercase", "ByteLevel", "Strip") else None
