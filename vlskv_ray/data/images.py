"""Images from untrusted rows: read only inside the image folder, decoded only within limits, always to RGB uint8.

A bad image raises `Rejected`, a forbidden reference `Refused`; nothing else leaves this module, whatever the bytes are.
"""

import base64
import binascii
import errno
import io
import os
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms

from vlskv_ray.data.missing_images import nearest_to
from vlskv_ray.data.sample import ImageFile, Refused, Rejected

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000

# Pillow knows 43 formats, some of which run other programs (EPS). A multi-picture JPEG (MPO) opens as "JPEG".
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")

# What Pillow's plugins raise for bad bytes. UnidentifiedImageError is an OSError, NotImplementedError a RuntimeError.
_BAD_BYTES = (
    OSError,
    ValueError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)

# Formats people do have and we do not open: (offset, magic bytes, name).
_OTHER_FORMATS = (
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"SIMPLE", "FITS"),
    (0, b"icns", "ICNS"),
    (0, b"DDS ", "DDS"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (257, b"ustar", "TAR"),
)

_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk")  # PNG, JPEG, GIF, WebP, BMP

# EXIF orientation -> what brings the stored pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 8,
    max_aspect: float = 50.0,
) -> Image.Image:
    """Decodes an encoded image: first frame, upright, 16-bit grey scaled to 8, transparency on white.

    Args:
        data: the file's content; its format is read from the content, never from a name.
        max_bytes: size limit of `data`.
        max_pixels: limit of width x height, checked before decoding; Pillow's own limit, 179 million, stays.
        min_side: shortest side in pixels.
        max_aspect: longest side over shortest side.

    Returns:
        An RGB uint8 image without metadata, so that nothing downstream can turn it a second time.

    Raises:
        Rejected: the image cannot be used: image_empty, image_unreadable, image_format, image_truncated, image_corrupt,
            image_too_large, image_too_small, image_aspect.
    """
    if not data:
        raise Rejected("image_empty", "the image has 0 bytes")
    if len(data) > max_bytes:
        raise Rejected("image_too_large", f"the image has {len(data):,} bytes; at most {max_bytes:,} are accepted")
    limits = (max_pixels, min_side, max_aspect)
    try:
        return _decoded(data, *limits)
    except Rejected as reason:
        # Pillow opens no PNG whose profile or texts are large unpacked, a guard against bombs: its pixels are whole.
        pixels = _without_metadata(data) if reason.code in ("image_unreadable", "image_corrupt") else b""
        if not pixels:
            raise
        return _decoded(pixels, *limits)


def _decoded(data: bytes, max_pixels: int, min_side: int, max_aspect: float) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata and about sizes which are checked here
        image = _opened(data)
        try:
            _check_size(*image.size, max_pixels, min_side, max_aspect)
            image.load()
            upright = _UPRIGHT.get(_orientation(image))  # after load(): TIFF is turned, and its tag dropped, in there
            rgb = _to_rgb(image)
            rgb.info.clear()
            return rgb if upright is None else rgb.transpose(upright)
        except Rejected:
            raise
        except (MemoryError, Image.DecompressionBombError) as error:
            raise Rejected("image_too_large", f"the image does not fit in memory: {_line(error)}") from error
        except _BAD_BYTES as error:
            truncated = _is_cut_short(data) or "truncated" in str(error).lower()
            code, what = ("image_truncated", "ends too early") if truncated else ("image_corrupt", "is damaged")
            raise Rejected(code, f"the {image.format} image {what}: {_line(error)}") from error
        finally:
            image.close()


def read_image_file(path: str, root: Path | None, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Reads the image a row refers to: a file inside `root`, or a base64 `data:` URI.

    Args:
        path: as the row has it: relative to `root`, or absolute and inside it. Links are followed first, judged after.
        root: the only folder that may be read from; None when there is none.
        max_bytes: size limit, checked before reading.

    Raises:
        Refused: path_outside_root; remote_image for every URL.
        Rejected: image_missing, image_not_file, image_permission, image_path, image_too_large, image_unreadable.
    """
    shown = repr(path if len(path) <= 120 else path[:117] + "...")
    if path[:5].lower() == "data:":
        return _from_data_uri(path, shown, max_bytes)
    if len(path) > 255 and path.startswith(_BASE64_STARTS):  # one begins with a slash, as a path outside would
        raise Rejected("image_path", f"{shown} is a picture as base64; write data:image/png;base64, or alike before it")
    if re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        raise Refused("remote_image", f"{shown} is a URL; download images first and name them relative to image_root")
    if "\0" in path or not _is_encodable(path):
        raise Rejected("image_path", f"{shown} is not a file name")
    if root is None:
        raise Refused("path_outside_root", f"{shown} is a path but the source has no image_root; set image_root")
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, path))
    if not Path(real).is_relative_to(real_root):
        raise Refused(
            "path_outside_root", f"{shown} leads outside image_root {str(root)!r}; move the file or set image_root"
        )
    try:
        # O_NONBLOCK: a FIFO would wait for a writer. O_NOFOLLOW: the path is resolved, nothing may turn it into a link.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Rejected("image_not_file", f"{shown} is not a regular file")
            data = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    except IsADirectoryError as error:
        raise Rejected("image_not_file", f"{shown} is a folder") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = nearest_to(path, real_root) or "is image_root right?"
        raise Rejected("image_missing", f"{shown} is not in image_root {str(root)!r}; {remedy}") from error
    except PermissionError as error:
        raise Rejected("image_permission", f"{shown} may not be read by this user") from error
    except OSError as error:
        names = {errno.ENAMETOOLONG: "image_path", errno.ELOOP: "image_path", errno.ENXIO: "image_not_file"}
        raise Rejected(names.get(error.errno or 0, "image_unreadable"), f"{shown}: {error.strerror}") from error
    if status.st_size > max_bytes or len(data) > max_bytes:
        raise Rejected("image_too_large", f"{shown} has {status.st_size:,} bytes; at most {max_bytes:,} are accepted")
    return data


def load_image(image: bytes | ImageFile) -> Image.Image:
    """One image of a sample as RGB uint8: read when it is a file, decoded, within the default limits.

    Raises:
        Rejected: see `read_image_file` and `decode_image`.
    """
    return decode_image(read_image_file(image.path, image.root) if isinstance(image, ImageFile) else image)


def _opened(data: bytes) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise Rejected("image_too_large", _line(error)) from error
    except _BAD_BYTES as error:
        code, detail = _unidentified(data)
        raise Rejected(code, detail) from error


_PNG = b"\x89PNG\r\n\x1a\n"


def _without_metadata(data: bytes) -> bytes:
    """A PNG without its colour profile and texts, none of which are unpacked; nothing where it has none."""
    if not data.startswith(_PNG):
        return b""
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])  # length, type, content, checksum
        if data[at + 4 : at + 8] not in (b"iCCP", b"iTXt", b"zTXt", b"tEXt"):
            kept.append(data[at:end])
        at = end
    slim = b"".join(kept)
    return slim if len(slim) < len(data) else b""


def _unidentified(data: bytes) -> tuple[str, str]:
    """The reason code for bytes in which no accepted format was found, and what they look like."""
    accepted = ", ".join(_FORMATS)
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return "image_format", f"this is an SVG drawing; convert it to one of {accepted}"
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "image_unreadable", "looks like HTML, such as the error page of a failed download"
    for offset, magic, name in _OTHER_FORMATS:
        if data.startswith(magic, offset):
            return "image_format", f"this is {name}; convert it to one of {accepted}"
    if _is_cut_short(data):
        return "image_truncated", f"the file ends too early, after {len(data):,} bytes"
    return "image_unreadable", f"cannot be read as any of {accepted}; begins with {data[:8]!r}"


def _is_cut_short(data: bytes) -> bool:
    """Whether a WebP (by its stated length) or a TIFF (by where its directory lies) ends before it should."""
    if data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    for magic, order in ((b"II*\0", "<"), (b"MM\0*", ">")):
        if data.startswith(magic):
            return len(data) < 8 or struct.unpack_from(order + "I", data, 4)[0] + 2 > len(data)
    return False


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_aspect: float) -> None:
    if width * height > max_pixels:
        raise Rejected("image_too_large", f"{width}x{height} pixels; at most {max_pixels:,} pixels are accepted")
    if max(width, height) > max_aspect * min(width, height):
        raise Rejected("image_aspect", f"{width}x{height} pixels; wanted sides within a ratio of {max_aspect:g}")
    if min(width, height) < min_side:
        raise Rejected("image_too_small", f"{width}x{height} pixels; at least {min_side} on each side are wanted")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 when the metadata are garbage: the pixels are still good."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _BAD_BYTES:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB in a new image. Pillow's own conversion shows hidden pixels and turns 16-bit grey white."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # x * 255 / 65535, rounded
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise Rejected("image_format", f"32-bit pixels (mode {image.mode}) have no agreed range; wanted 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _from_data_uri(uri: str, shown: str, max_bytes: int) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise Rejected("image_unreadable", f"{shown} is not a base64 data URI (data:image/png;base64,...)")
    if len(payload) * 3 // 4 > max_bytes + 2:
        raise Rejected("image_too_large", f"{shown} holds more than {max_bytes:,} bytes")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected("image_unreadable", f"{shown} is not valid base64: {error}") from error


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
