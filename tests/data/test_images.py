"""Images from untrusted rows: what is used, what is left out and why, and what is never opened."""

import base64
import contextlib
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlskv_ray.data.images import decode_image, load_image, read_image_file
from vlskv_ray.data.sample import ImageFile, Refused, Rejected


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds next to nothing: decoding it must not even begin."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


JPEG = encode(noise(), "JPEG")
PNG = encode(noise(), "PNG")
WEBP = encode(noise(), "WEBP")


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"", "image_empty", id="zero bytes"),
        pytest.param(JPEG[:20], "image_unreadable", id="20 bytes of a JPEG"),
        pytest.param(JPEG[: len(JPEG) // 2], "image_truncated", id="half a JPEG"),
        pytest.param(encode(noise(), "JPEG", progressive=True)[:-200], "image_truncated", id="progressive JPEG cut"),
        pytest.param(flipped(PNG, len(PNG) // 2), "image_corrupt", id="bit flip in PNG data"),
        pytest.param(PNG[: len(PNG) // 2], "image_truncated", id="half a PNG"),
        pytest.param(WEBP[: len(WEBP) // 2], "image_truncated", id="half a WebP"),
        pytest.param(WEBP[:30], "image_truncated", id="30 bytes of a WebP"),
        pytest.param(encode(noise(), "TIFF")[:-2000], "image_truncated", id="TIFF cut"),
        pytest.param(encode(noise(), "TIFF", compression="tiff_lzw")[:-2000], "image_truncated", id="LZW TIFF cut"),
        pytest.param(png_header(14000, 14000), "image_too_large", id="196 MP, above Pillow's limit"),
        pytest.param(png_header(10000, 10000), "image_too_large", id="100 MP, Pillow only warns"),
        pytest.param(png_header(9000, 9000), "image_too_large", id="81 MP, Pillow is silent"),
        pytest.param(encode(noise(1, 1), "PNG"), "image_too_small", id="1x1"),
        pytest.param(encode(noise(7, 20), "PNG"), "image_too_small", id="7x20"),
        pytest.param(encode(noise(1, 2000), "PNG"), "image_aspect", id="1x2000"),
        pytest.param(encode(noise(2000, 1), "PNG"), "image_aspect", id="2000x1"),
        pytest.param(encode(Image.new("I", (20, 20)), "TIFF"), "image_format", id="32-bit integers"),
        pytest.param(encode(Image.new("F", (20, 20)), "TIFF"), "image_format", id="floats"),
        pytest.param(b"<!DOCTYPE html><html>404</html>", "image_unreadable", id="HTML"),
        pytest.param(b'<?xml version="1.0"?><svg xmlns="x"/>', "image_format", id="SVG"),
        pytest.param(encode(noise(), "EPS"), "image_format", id="EPS"),
        pytest.param(encode(noise(), "PDF"), "image_format", id="PDF"),
        pytest.param(encode(noise(), "DDS"), "image_format", id="DDS"),
        pytest.param(encode(noise(), "ICNS"), "image_format", id="ICNS"),
        pytest.param(encode(noise(), "JPEG2000"), "image_format", id="JPEG 2000"),
        pytest.param(b"8BPS\0\1" + b"\0" * 50, "image_format", id="PSD"),
        pytest.param(b"\0\0\0\x18ftypheic" + b"\0" * 50, "image_format", id="HEIC"),
        pytest.param(b"\xff\x0a" + b"\0" * 50, "image_format", id="JPEG XL"),
        pytest.param(b"SIMPLE  =" + b" " * 50, "image_format", id="FITS"),
    ],
)
def test_unusable_bytes_are_rejected_with_a_reason(data: bytes, code: str) -> None:
    """Every kind of bad bytes has its code, and raises nothing but Rejected."""
    with pytest.raises(Rejected) as caught:
        decode_image(data)
    assert caught.value.code == code, caught.value
    assert "\n" not in caught.value.detail


def test_random_damage_never_raises_anything_else() -> None:
    """Any byte of any accepted format may be wrong: the outcome is an image or Rejected."""
    rng = np.random.default_rng(1)
    formats = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    originals = [encode(noise(24, 16), format) for format in formats]
    for data in originals:
        for _ in range(60):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(damaged), 4):
                damaged[at] = rng.integers(256)
            with contextlib.suppress(Rejected):
                assert decode_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("size", [(64, 48), (33, 71)])
def test_accepted_formats_become_rgb(format: str, size: tuple[int, int]) -> None:
    """The format is found in the content; the result is RGB uint8 of the same size."""
    image = decode_image(encode(noise(*size), format))
    assert (image.mode, image.size, np.asarray(image).dtype) == ("RGB", size, np.uint8)


def test_lossless_pixels_arrive_unchanged() -> None:
    assert np.array_equal(decode_image(PNG), noise())


def test_png_without_its_end_is_used() -> None:
    assert np.array_equal(decode_image(PNG[: PNG.index(b"IEND") - 4]), noise())


def test_first_frame_is_used() -> None:
    """Animations and multi-page files count as their first picture."""
    red, blue = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        pixel = decode_image(encode(red, format, save_all=True, append_images=[blue])).getpixel((5, 5))
        assert pixel[0] > 240 and pixel[2] < 15, format


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_brought_upright_once(format: str, orientation: int) -> None:
    """Where the stored pixels go for each EXIF orientation, corner by corner, and no tag stays to turn them again."""
    colours = {"tl": (255, 0, 0), "tr": (0, 255, 0), "bl": (0, 0, 255), "br": (255, 255, 255)}
    stored = Image.new("RGB", (64, 32))
    for corner, at in {"tl": (0, 0), "tr": (32, 0), "bl": (0, 16), "br": (32, 16)}.items():
        stored.paste(colours[corner], (*at, at[0] + 32, at[1] + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(stored, format, exif=exif, **({"quality": 100} if format == "JPEG" else {})))

    # EXIF 2.32, 4.6.4: which stored corner is seen at top left, top right, bottom left, bottom right.
    seen = [
        "tl tr bl br",
        "tr tl br bl",
        "br bl tr tl",
        "bl br tl tr",
        "tl bl tr br",
        "bl tl br tr",
        "br tr bl tl",
        "tr br tl bl",
    ]
    width, height = upright.size
    assert upright.size == ((64, 32) if orientation <= 4 else (32, 64))
    places = [(8, 8), (width - 8, 8), (8, height - 8), (width - 8, height - 8)]
    for place, corner in zip(places, seen[orientation - 1].split(), strict=True):
        assert np.allclose(upright.getpixel(place), colours[corner], atol=12), (place, corner)
    assert ImageOps.exif_transpose(upright).size == upright.size and not upright.info


def test_garbage_metadata_are_ignored_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert decode_image(encode(noise(), "JPEG", exif=exif)).size == (64, 48)
    assert not recwarn.list


def test_16_bit_grey_is_scaled() -> None:
    """Pillow by itself shows every 16-bit value above 255 as white."""
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        image = decode_image(encode(Image.fromarray(values), format))
        assert np.array_equal(np.asarray(image)[..., 0], np.rint(values / 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(mode: str) -> None:
    """What is hidden under transparency never comes to light."""
    secret = noise().convert("RGBA")
    secret.putalpha(0)
    if mode == "P":
        image = Image.new("P", (20, 20), 3)
        image.putpalette([10, 20, 30] * 256)
        data = encode(image, "PNG", transparency=3)
    else:
        data = encode(secret.convert(mode), "PNG")
    assert set(decode_image(data).get_flattened_data()) == {(255, 255, 255)}


def test_half_transparency_is_blended_with_white() -> None:
    pixel = decode_image(encode(Image.new("RGBA", (20, 20), (255, 0, 0, 128)), "PNG")).getpixel((0, 0))
    assert np.allclose(pixel, (255, 127, 127), atol=1)


@pytest.mark.parametrize(
    ("mode", "format", "colour"),
    [("CMYK", "JPEG", (0, 255, 255, 0)), ("CMYK", "TIFF", (0, 255, 255, 0)), ("YCbCr", "TIFF", (76, 85, 255))],
)
def test_other_colour_spaces_keep_their_colours(mode: str, format: str, colour: tuple[int, ...]) -> None:
    """Red stays red; a CMYK JPEG is stored inverted (Adobe)."""
    pixel = decode_image(encode(Image.new(mode, (16, 16), colour), format)).getpixel((8, 8))
    assert np.allclose(pixel, (255, 0, 0), atol=4)


@pytest.mark.parametrize(("mode", "format"), [("1", "PNG"), ("L", "PNG"), ("LAB", "TIFF")])
def test_remaining_modes_are_used(mode: str, format: str) -> None:
    assert decode_image(encode(Image.new(mode, (16, 16)), format)).mode == "RGB"


def test_limits_are_arguments() -> None:
    for limit, code in {"max_bytes": "image_too_large", "max_pixels": "image_too_large"}.items():
        with pytest.raises(Rejected, match=code):
            decode_image(PNG, **{limit: 100})
    with pytest.raises(Rejected, match="image_too_small"):
        decode_image(PNG, min_side=49)
    with pytest.raises(Rejected, match="image_aspect"):
        decode_image(PNG, max_aspect=1.3)


# --- References ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder and, outside it, a secret."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "good.png").write_bytes(PNG)
    (folder / "sub" / "good.png").write_bytes(PNG)
    (folder / "empty.png").write_bytes(b"")
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link_out.png").symlink_to(tmp_path / "secret.png")
    (folder / "link_in.png").symlink_to("good.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "fifo.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(2**26)
    return folder


@pytest.mark.parametrize("path", ["good.png", "sub/good.png", "sub/../good.png", "./good.png", "link_in.png"])
def test_files_inside_the_root_are_read(root: Path, path: str) -> None:
    assert read_image_file(path, root) == PNG
    assert read_image_file(str(root / path), root) == PNG
    assert load_image(ImageFile(path, root)).size == (64, 48)


@pytest.mark.parametrize(
    ("path", "code", "refused"),
    [
        ("nothing.png", "image_missing", False),
        ("good.png/more.png", "image_missing", False),
        ("sub", "image_not_file", False),
        ("", "image_not_file", False),
        ("fifo.png", "image_not_file", False),
        ("a\0b.png", "image_path", False),
        ("\ud800.png", "image_path", False),
        ("a" * 300 + ".png", "image_path", False),
        ("loop.png", "image_path", False),
        ("large.png", "image_too_large", False),
        ("../secret.png", "path_outside_root", True),
        ("sub/../../secret.png", "path_outside_root", True),
        ("../../../../../../etc/passwd.png", "path_outside_root", True),
        ("/etc/hostname", "path_outside_root", True),
        ("/dev/zero", "path_outside_root", True),
        ("/proc/self/environ", "path_outside_root", True),
        ("//etc/hostname", "path_outside_root", True),
        ("link_out.png", "path_outside_root", True),
        ("../images_of_others/x.png", "path_outside_root", True),
        ("http://169.254.169.254/latest/meta-data", "remote_image", True),
        ("HTTPS://example.com/a.png", "remote_image", True),
        ("s3://bucket/a.png", "remote_image", True),
        ("file:///etc/hosts", "remote_image", True),
        ("data:image/png,raw", "image_unreadable", False),
        ("data:image/png;base64,%%%", "image_unreadable", False),
        ("data:image/png;base64,\u00e9", "image_unreadable", False),
        ("data:image/png;base64," + "A" * 2**26, "image_too_large", False),
    ],
)
def test_bad_references_are_rejected_and_dangerous_ones_refused(
    root: Path, path: str, code: str, refused: bool
) -> None:
    """A FIFO does not block, a link does not lead out, a URL is not fetched."""
    with pytest.raises(Rejected) as caught:
        read_image_file(path, root)
    assert caught.value.code == code, caught.value
    assert isinstance(caught.value, Refused) == refused
    assert len(caught.value.detail) < 500


def test_a_path_without_a_root_is_refused() -> None:
    with pytest.raises(Refused, match="path_outside_root"):
        read_image_file("good.png", None)


def test_data_uri_is_decoded() -> None:
    assert read_image_file("data:image/png;base64," + base64.b64encode(PNG).decode(), None) == PNG


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Root may read everything: give its rights up for the test."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    yield
    if was_root:
        os.seteuid(0)


def test_unreadable_file_is_rejected(root: Path, request: pytest.FixtureRequest) -> None:
    (root / "good.png").chmod(0)
    request.getfixturevalue("as_nobody")
    with pytest.raises(Rejected, match="image_permission"):
        read_image_file("good.png", root)


def test_reasons_survive_pickling() -> None:
    """Rejected travels between processes."""
    make: list[Callable[[str, str], Rejected]] = [Rejected, Refused]
    for error in (cls("code", "detail") for cls in make):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.code, copy.detail, str(copy)) == (type(error), "code", "detail", "code: detail")


# --- PNG metadata ---


def with_chunk(kind: bytes, content: bytes, after: bytes) -> bytes:
    """PNG with one more chunk, behind the first one of another kind."""
    at = PNG.index(after) - 4
    at += 12 + int.from_bytes(PNG[at : at + 4])
    checksum = zlib.crc32(kind + content).to_bytes(4)
    return PNG[:at] + len(content).to_bytes(4) + kind + content + checksum + PNG[at:]


LARGE = zlib.compress(np.random.default_rng(0).bytes(3 * 2**19))  # 1.5 MiB, more than Pillow unpacks
BOMB = zlib.compress(bytes(2**28))


@pytest.mark.parametrize("unpacked", [LARGE, BOMB], ids=["honest", "bomb"])
@pytest.mark.parametrize(
    ("kind", "head", "after"),
    [
        (b"iCCP", b"profile\0\0", b"IHDR"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0", b"IHDR"),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0", b"IDAT"),
        (b"zTXt", b"Raw profile type xmp\0\0", b"IHDR"),
        (b"zTXt", b"Raw profile type xmp\0\0", b"IDAT"),
    ],
)
def test_large_metadata_of_a_png_do_not_cost_its_pixels(
    kind: bytes, head: bytes, after: bytes, unpacked: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pixels or after them; nothing large is unpacked on the way."""
    sizes: list[int] = []
    unpack = zlib.decompressobj

    class Counting:
        def __init__(self, *arguments: object) -> None:
            self.inner = unpack()

        def decompress(self, data: bytes, most: int = 0) -> bytes:
            found = self.inner.decompress(data, most)
            sizes.append(len(found))
            return found

        @property
        def unconsumed_tail(self) -> bytes:
            return self.inner.unconsumed_tail

    monkeypatch.setattr(zlib, "decompressobj", Counting)
    assert decode_image(with_chunk(kind, head + unpacked, after)).tobytes() == decode_image(PNG).tobytes()
    assert max(sizes, default=0) <= 2**20


def test_what_a_small_text_of_a_png_says_of_its_pixels_stays() -> None:
    """Pillow turns by an orientation in XMP: a PNG that it opens keeps all of its texts."""
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    assert decode_image(with_chunk(b"iTXt", xmp, b"IHDR")).size == decode_image(PNG).size[::-1]


# --- What is there instead of a missing file ---


@pytest.mark.parametrize(
    ("there", "path", "words"),
    [
        ("b1.gif", "b1.jpg", "'b1.gif' is there, with another suffix"),
        ("sub/B1.PNG", "sub/b1.png", "'sub/B1.PNG' is there, in another case"),
        ("sub/b1.png", "SUB/b1.png", "'sub/b1.png' is there, in another case"),
        ("sub/b1.png", "sub\\b1.png", "'sub/b1.png' is there, with slashes for the backslashes of Windows"),
        ("a b.png", "a%20b.png", "'a b.png' is there, with its %-escapes decoded"),
        ("sub/a b.png", "sub\\a%20b.jpg", "with its %-escapes decoded and slashes for backslashes and with another su"),
        ("e\u0301.png", "\u00e9.png", "is there, in another Unicode form (NFD)"),
        ("\u00e9/a.png", "e\u0301/a.png", "is there, in another Unicode form (NFC)"),
        ("other.png", "C:\\data\\other.png", "it is a path of Windows"),
        ("other.png", "b1.png", "is image_root right?"),
        ("b1.gif/x.png", "b1.jpg", "is image_root right?"),
        ("sub/b1.png", "sub/%2e%2e/%2e%2e/secret.png", "is image_root right?"),
        ("b1.gif", "a%00b.png", "is image_root right?"),
    ],
)
def test_a_missing_picture_that_is_there_otherwise_is_named(there: str, path: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "images" / there).parent.mkdir(parents=True)
    (tmp_path / "images" / there).write_bytes(PNG)
    with pytest.raises(Rejected, match="image_missing") as caught:
        read_image_file(path, tmp_path / "images")
    assert words in caught.value.detail and "secret.png' is there" not in caught.value.detail


def test_a_folder_is_listed_once_for_many_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a large data set may be missing."""
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    (tmp_path / "b1.gif").write_bytes(PNG)
    for number in range(50):
        with pytest.raises(Rejected, match="image_missing"):
            read_image_file(f"b{number}.jpg", tmp_path)
    assert len(listed) == 1


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_base64_instead_of_a_path_is_named(format: str, tmp_path: Path) -> None:
    """That of a JPEG begins with a slash: it is no file outside the folder."""
    with pytest.raises(Rejected, match="image_path: .*is a picture as base64; write data:image") as caught:
        read_image_file(base64.b64encode(encode(noise(), format)).decode(), tmp_path)
    assert not isinstance(caught.value, Refused) and len(caught.value.detail) < 500
