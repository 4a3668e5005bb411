"""Headers read without Pillow: what they say is what Pillow says."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from library.data.headers import read_header
from library.images import load, read_image_info
from library.size import Size

NOISE = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
RAW_PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + EXIF).hex().encode() + b"\n"
XMP = b'<x tiff:Orientation="6"/>'


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


XMP_CHUNK = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)


def png(*before_pixels: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "png")
    raw = buffer.getvalue()
    return raw[:33] + b"".join(before_pixels) + raw[33:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_exif_is_read_as_pillow_reads_it(orientation, ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(NOISE).save(path, exif=exif(orientation), icc_profile=b"x" * 9000)  # a profile before the size
    header = read_header(str(path))
    with Image.open(path) as image:
        assert header is not None and header.size == image.size
        assert header.orientation == image.getexif()[0x0112] == orientation
    assert read_image_info(path).is_turned == (orientation > 1)


def test_big_endian_exif_and_xmp_count_too(tmp_path):
    (tmp_path / "exif.png").write_bytes(png(chunk(b"eXIf", EXIF)))
    assert read_image_info(tmp_path / "exif.png").size == Size(40, 80)
    (tmp_path / "xmp.png").write_bytes(png(XMP_CHUNK))
    assert read_image_info(tmp_path / "xmp.png").size == Size(40, 80)
    with Image.open(tmp_path / "xmp.png") as image:
        image.load()
        assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("is_behind_pixels", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        XMP_CHUNK,
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(XMP)),
    ],
    ids=["raw profile", "compressed raw profile", "XMP", "compressed XMP"],
)
def test_orientation_in_text_chunks_turns_size_and_pixels(text, is_behind_pixels, tmp_path):
    raw, path = png(), tmp_path / "x.png"
    at = raw.rindex(b"IEND") - 4 if is_behind_pixels else 33
    path.write_bytes(raw[:at] + text + raw[at:])
    assert read_image_info(path) == (Size(40, 80), True, False)
    assert load(path).shape == (80, 40, 3)


def test_only_such_text_is_left_to_pillow_wherever_the_first_read_cuts_it(tmp_path):
    other = chunk(b"iTXt", b"Title\0\0\0\0\0" + XMP)
    raw_profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE))
    for length in range(4000, 4100):
        before = chunk(b"tEXt", b"parameters\0" + b"a" * length)
        (tmp_path / "x.png").write_bytes(png(before, other))
        assert read_header(str(tmp_path / "x.png")) == (Size(80, 40), 1, False)
        (tmp_path / "x.png").write_bytes(png(before, raw_profile))
        assert read_header(str(tmp_path / "x.png")) is None


@pytest.mark.parametrize("xmp, size", [(b"", Size(80, 40)), (XMP, Size(40, 80))])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("broken", [b"\0" * 20, b"II*\0", b"II*\0\x08\0", b"no TIFF file at all"])
def test_broken_exif_counts_as_none(broken, ending, xmp, size, tmp_path):
    path = tmp_path / f"x.{ending}"
    if ending == "png":
        path.write_bytes(png(chunk(b"eXIf", broken), *([XMP_CHUNK] if xmp else [])))
    else:
        Image.fromarray(NOISE).save(path, exif=b"Exif\0\0" + broken, xmp=xmp)
    assert read_image_info(path).size == size
    assert load(path).shape == (size.height, size.width, 3)


def test_letters_in_the_pixels_are_no_exif(tmp_path):
    raw = png()
    at = raw.rindex(b"IEND") - 4
    fake = chunk(b"zzZz", b"....eXIf" + b"MM\0*" * 4)  # a private chunk; its content's checksum isn't one of an eXIf
    (tmp_path / "x.png").write_bytes(raw[:at] + fake + raw[at:])
    assert read_image_info(tmp_path / "x.png") == (Size(80, 40), False, False)


@pytest.mark.parametrize("settings", [{"progressive": True}, {"quality": 30}, {"comment": b"y" * 6000}])
def test_kinds_of_jpeg(settings, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.jpg", **settings)
    assert read_header(str(tmp_path / "x.jpg")).size == Size(80, 40)


@pytest.mark.parametrize(
    "raw", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1\0\x04ab", b"text", png()[:30]]
)
def test_what_is_cut_or_something_else_is_left_to_pillow(raw, tmp_path):
    (tmp_path / "x").write_bytes(raw)
    assert read_header(str(tmp_path / "x")) is None


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_fault_30_animated_images_are_seen_by_their_header(ending, tmp_path):
    frames = [Image.new("RGB", (32, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))  # fmt: skip
    assert read_image_info(tmp_path / f"x.{ending}") == (Size(32, 16), False, True)
