"""From a row of a file to a `Sample`: the checks that every row passes, whatever its layout."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.data.image_columns import picture_in_part, picture_of, unread_in
from vlskv_ray.data.layouts import TEXT, Layout, find_layout, no_fit
from vlskv_ray.data.sample import ImageFile, Notice, Rejected, Sample

MARKER = "<image>"
IMAGE_PARTS = ("image", "image_url")
"""Types of parts that are pictures."""

# What no text means to say: control characters but for tab and line ends, and code points that are no characters. Told
# by what a text may hold, which is ten times as fast to look for.
_CONTROL = re.compile("[^\t\n\r -~\xa0-\ufdcf\ufdf0-\ufffd\U00010000-\U0010ffff]")
_LINE_ENDS = "\x0b\x0c\x85"  # they part lines, or pages: without them words would run together
_BASE64_STARTS = (";base64,", "iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # of data URIs; PNG, JPEG, GIF, WebP
_BASE64_PICTURE = re.compile(f"(?:{'|'.join(_BASE64_STARTS)})[A-Za-z0-9+/\r\n]{{400}}")  # far more than an example has


def sample_of(
    uid: str,
    row: Mapping[str, Any],
    root: Path | None,
    ignored: Collection[str] = (),
    layout: Layout | None = None,
    *,
    prompt: bool = False,
) -> Sample:
    """Checks a row and brings it into the one form everything else knows.

    Args:
        uid: of the row.
        row: its columns.
        root: the only folder that its image paths may lead into; None: no folder.
        ignored: columns that are not read even where they look like pictures.
        layout: of its source; None: the one that its columns fit.
        prompt: it may end with a question; an answer at its end that has no text is none.

    Raises:
        Rejected: schema, conv_empty, role_unknown, no_answer, role_order, content_type, question_empty, answer_empty,
            marker_mismatch, image_null, image_unread, text_encoding, text_base64.
    """
    layout = layout or find_layout(row, ignored)
    _check_columns(row, layout)
    if unread := unread_pictures(row, layout, ignored):
        raise Rejected("image_unread", unread_message([*map(repr, unread)], layout))
    turns = _make_turns(row, layout)
    if prompt:
        turns = without_empty_answer(turns)
    _check_roles([turn.get("role") for turn in turns], prompt)
    images, has_null = _images(row, turns, layout, root)
    messages = [
        {"role": turn["role"], "content": _parts(turn["content"], turn["role"], bool(images))}
        | ({"cut": True} if is_cut(turn) else {})
        for turn in turns
    ]
    notices = _clean(messages)
    _place_images(messages, images, has_null)
    _check_texts(messages)
    return Sample(uid, messages, images, notices=notices)


def _check_columns(row: Mapping[str, Any], layout: Layout) -> None:
    """Rejected where a column that the layout needs is missing, or holds nothing that it can be made turns of."""
    if not layout.required.keys() <= row.keys():
        raise no_fit(row, str(layout))
    for column, what in layout.required.items():
        held = row[column]
        if isinstance(what, tuple):
            if not held:
                raise Rejected("conv_empty", "the conversation has no turns")
            if not isinstance(held, list) or not all(isinstance(entry, dict) for entry in held):
                wanted = f"a list of {{{', '.join(what)}}}"
                raise Rejected("schema", f"the conversation is {type(held).__name__}; wanted {wanted}")
        elif what == TEXT and not isinstance(held, str):
            found = "is null" if held is None else f"is {type(held).__name__}"
            raise Rejected("content_type", f"the column {column!r} {found}; wanted text")


def _make_turns(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """A row's turns. Rejected, too, where its layout stumbles over a value: no row harms another."""
    try:
        turns = layout.make_turns(row)
    except Rejected:
        raise
    except Exception as error:  # it is anybody's function, and may raise anything
        problem = f"the layout {layout.name} cannot make turns of it, {type(error).__name__}: {error}"
        raise Rejected("schema", f"{problem}; wanted {layout}") from error
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        made = type(turns).__name__
        raise Rejected("schema", f"the layout {layout.name} makes {made} of it; wanted a list of turns, each an object")
    return list(turns)


def unread_pictures(row: Mapping[str, Any], layout: Layout, ignored: Collection[str] = ()) -> list[str]:
    """The columns that look like pictures and are not read; keys of turns as `messages.image`."""
    beside = any(row.get(column) for column in layout.image_columns)
    unread = unread_in(row, layout.columns, ignored, beside_pictures=beside)
    for column, keys in layout.required.items():
        entries = row.get(column)
        for entry in entries if isinstance(keys, tuple) and isinstance(entries, list) else ():
            if isinstance(entry, dict) and len(entry) > len(keys):
                unread += unread_in(entry, keys, ignored, f"{column}.", beside)
    return list(dict.fromkeys(unread)) if unread else unread


def unread_message(columns: Sequence[str], layout: Layout) -> str:
    """What to do about columns that look like pictures and are not read."""
    one = len(columns) == 1
    give = f"give pictures in the column {layout.image_columns[0]}, or " if layout.image_columns else ""
    return (
        f"{', '.join(columns)} {'looks like a picture' if one else 'look like pictures'} and {'is' if one else 'are'} "
        f"not read; {give}list {'it' if one else 'them'} in ignore_columns of the source"
    )


def without_empty_answer(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns without a last one that has a place for an answer and no text in it."""
    if not turns or turns[-1].get("role") != "assistant":
        return turns
    content = turns[-1].get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    is_empty = all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)
    return turns[:-1] if is_empty else turns


def is_cut(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is an answer that was cut, so that its end is none; `finish_reason` is OpenAI's word for it."""
    return bool(turn["role"] == "assistant" and turn.get("finish_reason") == "length")


def _check_roles(roles: list[Any], prompt: bool) -> None:
    known = ("system", "user", "assistant")
    unknown = [role for role in roles if role not in known]
    if unknown:
        raise Rejected("role_unknown", f"role {unknown[0]!r}; wanted one of {', '.join(known)}")
    if "assistant" not in roles and not prompt:
        remedy = "vlskv-ray answers has a model write it"
        raise Rejected("no_answer", f"the conversation has no assistant turn to learn from; {remedy}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    in_turn = ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2 if prompt else 0)
    if turns != in_turn or not turns:
        raise Rejected("role_order", f"{', '.join(roles)}; wanted an optional system, then user and assistant in turn")


# --------------------------------------------------------------------------------------------------------- the pictures
def _images(
    row: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], layout: Layout, root: Path | None
) -> tuple[list[bytes | ImageFile], bool]:
    """The images of a row, of its columns or of its parts, and whether one is given as null."""
    in_columns, has_null = _images_of_columns(row, layout.image_columns, root)
    in_parts: list[tuple[bytes | ImageFile | None, bool]] = []
    for number, turn in enumerate(turns, 1):
        content = turn.get("content")
        if isinstance(content, list):
            in_parts += [picture_in_part(part, root) for part in content if _is_image(part)]
        elif not isinstance(content, str):
            raise _no_content(number, turn)
    if not in_parts:
        return in_columns, has_null
    of_parts = [picture for picture, _ in in_parts if picture is not None]
    has_null = has_null or any(is_null for _, is_null in in_parts)
    if in_columns and of_parts and in_columns != of_parts:
        raise Rejected(
            "marker_mismatch",
            f"{len(in_columns)} images in the row's column and {len(of_parts)} others in the parts of its turns; "
            f"wanted them in one of the two",
        )
    return in_columns or of_parts, has_null


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in IMAGE_PARTS


def _no_content(number: int, turn: Mapping[str, Any]) -> Rejected:
    """Why a turn is rejected whose content is neither text nor parts."""
    content = turn.get("content")
    found = "is missing" if "content" not in turn else "is null" if content is None else type(content).__name__
    what = f"the content of turn {number} ({turn['role']})"
    return Rejected("content_type", f"{what}: {found}; wanted text or a list of parts")


def _images_of_columns(
    row: Mapping[str, Any], columns: Sequence[str], root: Path | None
) -> tuple[list[bytes | ImageFile], bool]:
    has_null = False
    given: dict[str, list[bytes | ImageFile]] = {}
    for column in columns:
        if column not in row:
            continue
        value = row[column]
        entries = value if isinstance(value, list) else [value]
        pictures = [picture_of(entry, root, repr(column)) for entry in entries]
        if isinstance(value, list) and None in pictures:
            which = f"entry {pictures.index(None) + 1} of {len(pictures)} in {column!r}"
            raise Rejected("image_null", f"{which} is null: the picture is missing; mend the row, or leave it out")
        has_null |= pictures == [None]
        if found := [picture for picture in pictures if picture is not None]:
            given[column] = found
    if not given:
        return [], has_null
    first, *others = given.values()
    if any(pictures != first for pictures in others):
        names = " and ".join(map(repr, given))
        raise Rejected("schema", f"{names} hold different pictures; wanted one of these columns")
    return first, has_null


def _place_images(messages: list[dict[str, Any]], images: Sequence[bytes | ImageFile], has_null: bool) -> None:
    """Images without any marker go before the first question; else there must be as many of both."""
    num_markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and not num_markers:
        if any(_is_at_an_end(part["text"]) for turn in messages if turn["role"] == "user" for part in turn["content"]):
            raise Rejected(
                "marker_mismatch",
                f"{len(images)} images without a part of their own, and a text part that begins or ends with {MARKER}, "
                f"which is text there; write {{type: image}} parts, or the turn's content as plain text",
            )
        first_user = next(message for message in messages if message["role"] == "user")
        first_user["content"] = [{"type": "image"} for _ in images] + first_user["content"]
    elif num_markers != len(images):
        found = f"{num_markers} image markers for {len(images)} images"
        if has_null:
            raise Rejected("image_null", f"{found}: a picture is null; mend the row, or leave it out")
        remedy = "" if images else f"; where the characters {MARKER} are meant, write a part {{type: text, text: ...}}"
        raise Rejected("marker_mismatch", f"{found}; wanted equally many{remedy}")


# ------------------------------------------------------------------------------------------------------------ the texts
def _parts(content: str | list[Any], role: str, has_images: bool) -> list[dict[str, str]]:
    """The parts of one turn. Only user turns hold images, and only in a string of theirs `<image>` is one."""
    if isinstance(content, list):
        return [_part(part, role) for part in content]
    is_marked = role == "user" and MARKER in content and (has_images or _is_at_an_end(content))
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(content.split(MARKER) if is_marked else [content]):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]  # templates ask for the first part of a system turn, be it empty


def _is_at_an_end(content: str) -> bool:
    """Whether `<image>` stands where data sets put an image: without any, one is missing. Within a text it is text."""
    content = content.strip()
    return content.startswith(MARKER) or content.endswith(MARKER)


def _part(part: Any, role: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part) > 2 and (unread := unread_in(part, ("type", "text"), ())):
            raise Rejected("image_unread", f"a text part holds a picture under {unread[0]!r}; wanted an image part")
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise Rejected("schema", f"content part {kind!r}; wanted {{type: text, text: ...}} or {{type: image}}")
    if role != "user":
        raise Rejected("schema", f"an image in a turn of role {role!r}; wanted images in user turns only")
    if len(part) > 1 and (unread := unread_in(part, _READ_OF_IMAGE_PART, ())):
        raise Rejected("image_unread", f"an image part's {unread[0]!r} is not read; wanted image, path or url")
    return {"type": "image"}


_READ_OF_IMAGE_PART = ("type", "image", "image_url", "source", "bytes", "path", "url", "base64", "data")


def _clean(messages: list[dict[str, Any]]) -> tuple[Notice, ...]:
    """Takes control characters out of all texts; says which.

    Raises:
        Rejected: a text cannot be one at all.
    """
    removed: list[str] = []
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                continue
            text = part["text"]
            if len(text) > 400 and any(start in text for start in _BASE64_STARTS) and _BASE64_PICTURE.search(text):
                raise Rejected("text_base64", "a text holds a picture as base64; give it as data URI in 'images'")
            if text.isprintable():  # so most are, and there is nothing more to look for
                continue
            try:
                text.encode()
            except UnicodeEncodeError as error:
                reason = f"half a surrogate pair at character {error.start}: not valid text"
                raise Rejected("text_encoding", reason) from error
            if found := _CONTROL.findall(text):
                removed += found
                part["text"] = _CONTROL.sub(lambda match: "\n" * (match[0] in _LINE_ENDS), text)
    if not removed:
        return ()
    kinds = ", ".join(f"U+{ord(character):04X}" for character in sorted(set(removed))[:5])
    return (Notice("control_characters", f"{len(removed)} control characters taken out of its text ({kinds})"),)


def _check_texts(messages: Sequence[Mapping[str, Any]]) -> None:
    """Rejected where an answer has no text, or a question neither text nor image."""
    for number, message in enumerate(messages, 1):
        for part in message["content"]:
            if part["type"] == "image" or part["text"].strip():
                break
        else:
            if message["role"] == "assistant":
                raise Rejected("answer_empty", f"the answer in turn {number} has no text")
            if message["role"] == "user":
                raise Rejected("question_empty", f"the question in turn {number} has neither text nor image")
