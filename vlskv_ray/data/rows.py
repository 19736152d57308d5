"""From a row of a file to a `Sample`: what its columns may be called, and the checks every row passes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlskv_ray.data.sample import ImageFile, Rejected, Sample, SourceError

# How each layout of conversations becomes turns of {"role", "content"}, by the column that shows it, preferred first. A
# further layout is one more entry. Images come from the columns `images` or `image` in all of them.
LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "messages": lambda row: row["messages"],
}
IMAGE_COLUMNS = ("images", "image")
WANTED = f"{' or '.join(LAYOUTS)} (list of {{role, content}}), with {' or '.join(IMAGE_COLUMNS)} for images"


def _layout(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], Any]:
    for column, turns in LAYOUTS.items():
        if column in columns:
            return turns
    raise Rejected("schema", f"found the columns {', '.join(map(repr, columns)) or '(none)'}; wanted {WANTED}")


def sample_of(uid: str, row: Mapping[str, Any], root: Path | None) -> Sample:
    """Checks a row and brings it into the one form everything else knows.

    Raises:
        Rejected: schema, conv_empty, role_unknown, no_answer, role_order, answer_empty, marker_mismatch, text_encoding.
    """
    turns = _layout(list(row))(row)
    if not turns:
        raise Rejected("conv_empty", "the conversation has no turns")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise Rejected("schema", f"the conversation is {type(turns).__name__}; wanted a list of {{role, content}}")
    roles = [turn.get("role") for turn in turns]
    _check_roles(roles)
    images = _images(row, root)
    messages = [
        {"role": role, "content": _parts(turn.get("content"), role, bool(images))}
        for role, turn in zip(roles, turns, strict=True)
    ]
    if any(m["role"] == "assistant" and not any(p["text"].strip() for p in m["content"]) for m in messages):
        raise Rejected("answer_empty", "an assistant turn has no text")
    num_markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images and not num_markers:
        first_user = messages[roles.index("user")]
        first_user["content"] = [{"type": "image"} for _ in images] + first_user["content"]
    elif num_markers != len(images):
        raise Rejected("marker_mismatch", f"{num_markers} image markers for {len(images)} images; wanted equally many")
    return Sample(uid, messages, images)


def _check_roles(roles: list[Any]) -> None:
    known = ("system", "user", "assistant")
    unknown = [role for role in roles if role not in known]
    if unknown:
        raise Rejected("role_unknown", f"role {unknown[0]!r}; wanted one of {', '.join(known)}")
    if "assistant" not in roles:
        raise Rejected("no_answer", "the conversation has no assistant turn to learn from")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise Rejected("role_order", f"{', '.join(roles)}; wanted an optional system, then user and assistant in turn")


def _parts(content: Any, role: str, has_images: bool) -> list[dict[str, str]]:
    """The parts of one turn. Only user turns hold images; a string's `<image>` is one if the row has any at all."""
    if content is None:
        return []
    if isinstance(content, str):
        pieces = content.split("<image>") if has_images and role == "user" else [content]
        parts: list[dict[str, str]] = []
        for index, piece in enumerate(pieces):
            parts += [{"type": "image"}] if index else []
            parts += [{"type": "text", "text": _text(piece)}] if piece else []
        return parts
    if not isinstance(content, list):
        raise Rejected("schema", f"content is {type(content).__name__}; wanted text or a list of parts")
    return [_part(part, role) for part in content]


def _part(part: Any, role: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _text(part["text"])}
    if kind != "image":
        raise Rejected("schema", f"content part {kind!r}; wanted {{type: text, text: ...}} or {{type: image}}")
    if role != "user":
        raise Rejected("schema", f"an image in a turn of role {role!r}; wanted images in user turns only")
    return {"type": "image"}


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("text_encoding", f"half a surrogate pair at character {error.start}: not valid text") from error
    return text


def _images(row: Mapping[str, Any], root: Path | None) -> list[bytes | ImageFile]:
    """The images of a row; null and "" are none."""
    column = next((column for column in IMAGE_COLUMNS if row.get(column)), None)
    values = row[column] if column else []
    images: list[bytes | ImageFile] = []
    for value in values if isinstance(values, list) else [values]:
        if isinstance(value, Mapping) and value.keys() & {"bytes", "path"}:
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            images.append(value)
        elif isinstance(value, str) and value:
            images.append(ImageFile(value, root))
        elif value is not None and value != "":
            raise Rejected("schema", f"{column} holds {type(value).__name__}; wanted a path, bytes or {{bytes, path}}")
    return images


def check_columns(columns: Sequence[str], place: str) -> None:
    """SourceError if no layout has these columns; `place` says whose they are."""
    try:
        _layout(columns)
    except Rejected as reason:
        raise SourceError(f"{place}: {reason.detail}") from reason
