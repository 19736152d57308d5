"""Where a row has its pictures: the ways of giving one that are read, and what looks like one and is not read."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vlskv_ray.data.sample import ImageFile, Rejected

IMAGE_COLUMNS = ("images", "image")
"""In which layouts have their pictures, unless they say otherwise; turns may have theirs in their parts instead."""

_NESTED = ("image", "image_url", "source")
"""Keys of a part under which formats keep the picture itself; the others stand in the part beside its type."""
_WAYS = ("bytes", "path", "url", "base64", "data")
_NAME = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?)"
    r"([ _-]?(paths?|files?|file_?names?|urls?|uris?|bytes|data|base64|b64|\d+))?",
    re.IGNORECASE,
)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jxl")
_IDENTITIES = ("id", "uid", "key", "__key__")
_LOOKED_AT = 8  # entries of a list
_LONGEST_PATH = 4096
_LONGEST_DIGEST = 32  # bytes; no encoded picture is as short


def picture_of(value: Any, root: Any, place: str) -> bytes | ImageFile | None:
    """The picture that a value stands for: encoded bytes, a path, a URL or data URI, or an object that holds one of
    these; None where it is null.

    Args:
        value: as the row has it.
        root: of a path, see `ImageFile`.
        place: where the value stands, for a reader.

    Raises:
        Rejected: schema.
    """
    if isinstance(value, Mapping) and value:
        way = next((way for way in _WAYS if value.get(way) is not None), None)
        if way is None and not value.keys() & set(_WAYS):
            raise Rejected("schema", f"{place} holds an object without any of the keys {', '.join(_WAYS)}")
        found = value[way] if way else None
        if way in ("base64", "data") and isinstance(found, str) and not found.startswith("data:"):
            found = f"data:{value.get('media_type') or 'image'};base64,{found}"
        value = found
    if value is None or value in ("", b"", {}):
        return None
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return ImageFile(value, root)
    raise Rejected("schema", f"{place} holds {type(value).__name__}; wanted a path, bytes or {{bytes, path}}")


def picture_in_part(part: Mapping[str, Any], root: Any) -> tuple[bytes | ImageFile | None, bool]:
    """The picture that a part of a turn holds itself, if it does, and whether it has a place for one that is null.

    Raises:
        Rejected: schema.
    """
    filled = [key for key in _NESTED if part.get(key) is not None]
    if len(filled) > 1:
        raise Rejected("schema", f"an image part has pictures under {' and '.join(map(repr, filled))}; wanted one")
    if filled:
        picture = picture_of(part[filled[0]], root, f"{filled[0]!r} of an image part")
    else:
        picture = picture_of({key: part[key] for key in _WAYS if key in part}, root, "an image part")
    return picture, picture is None and not part.keys().isdisjoint((*_NESTED, *_WAYS))


def looks_like_picture(name: str, value: Any, beside_pictures: bool = False, depth: int = 0) -> bool:
    """Whether what nothing reads may be a picture: by what it holds, or, being text, by what it is called.

    Beside pictures that are read, a text that only ends as a file's name is no such thing, unless it is called so: it
    says where they come from, as a rule.
    """
    if isinstance(value, str):
        if not value or name in _IDENTITIES:
            return False
        if _NAME.fullmatch(name) or value.startswith("data:image/"):
            return True
        if beside_pictures:
            return False
        path = value.partition("?")[0] if "://" in value else value  # of a URL: elsewhere "?" ends a question
        return len(value) <= _LONGEST_PATH and path[-5:].lower().endswith(_SUFFIXES)
    if isinstance(value, bytes):
        return len(value) > _LONGEST_DIGEST or bool(value and _NAME.fullmatch(name))
    if depth < 3 and isinstance(value, list):
        return any(looks_like_picture(name, entry, beside_pictures, depth + 1) for entry in value[:_LOOKED_AT])
    if depth < 3 and isinstance(value, Mapping):
        ways = {"image": value.get("image")} | {way: value.get(way) for way in _WAYS}
        named = [(name if way == "data" else way, held) for way, held in ways.items()]
        return any(looks_like_picture(way, held, beside_pictures, depth + 1) for way, held in named)
    return False


def unread_in(
    held: Mapping[str, Any],
    read: Collection[str],
    ignored: Collection[str],
    prefix: str = "",
    beside_pictures: bool = False,
) -> list[str]:
    """The keys of a row, a turn or a part that look like pictures and are not among those read or ignored."""
    return [
        f"{prefix}{key}"
        for key, value in held.items()
        if key not in read and f"{prefix}{key}" not in ignored and looks_like_picture(key, value, beside_pictures)
    ]
