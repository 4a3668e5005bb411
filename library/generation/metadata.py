"""Metadata of image files: the contract's texts, and all settings that generate the image again."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import OptionError
from library.generation.request import GenerationRequest
from library.log import log

if TYPE_CHECKING:
    from PIL.Image import Image

# Names in image files. They are a file format: don't rename them.
_SETTINGS = "settings"  # a JSON table of the two that follow
_REQUEST = "drawing"  # the request
_OPTIONS = "options"  # the options that differ from their defaults

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286  # the EXIF tags in which webp and jpeg store the texts
_UNICODE = b"UNICODE\0"
_MAX_EXIF = 65_500  # bytes of EXIF data in a jpeg file


def texts_of(request: GenerationRequest, stored_options: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts that are stored with an image.

    Args:
        request: the image's settings.
        stored_options: options of the run that image files store, without their defaults.
    """
    settings = {_REQUEST: request.as_json(), _OPTIONS: stored_options}
    texts = request.texts()
    texts[_SETTINGS] = json.dumps(settings, ensure_ascii=False, default=str)
    return texts


def save_arguments(texts: Mapping[str, str], image_format: str) -> dict[str, Any]:
    """Return the arguments with which Pillow stores the texts in a file of this format."""
    if image_format == "png":
        return {"pnginfo": _png_info(texts)}
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _comment(texts)
    if image_format == "webp":
        return {"exif": exif, "lossless": True}
    if len(exif.tobytes()) > _MAX_EXIF:  # the settings contain everything that the texts contain
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _comment({_SETTINGS: texts[_SETTINGS]})
    if len(exif.tobytes()) > _MAX_EXIF:
        log.warning(
            "the prompt is too long for a jpeg file; the image is saved without metadata "
            "(--image_format png and webp have no such limit)"
        )
        exif = Image.Exif()
    return {"exif": exif, "quality": 95}


def _png_info(texts: Mapping[str, str]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        if text.isascii():
            info.add_text(name, text)
        else:
            info.add_itxt(name, text)
    return info


def _comment(texts: Mapping[str, str]) -> bytes:
    return _UNICODE + json.dumps(dict(texts), ensure_ascii=False).encode("utf-16-be")


def read_texts(path: Path, flag: str) -> dict[str, str]:
    """Return the texts that an image file stores; an empty dict if there are none.

    Raises:
        OptionError: if the file can't be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _texts_in(image)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise OptionError(f"{flag} {path}: the file can't be read as an image: {error}") from None


def _texts_in(image: "Image") -> dict[str, str]:
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        texts = json.loads(comment.removeprefix(_UNICODE).decode("utf-16-be"))
    else:
        texts = getattr(image, "text", {})
    return {str(name): str(text) for name, text in texts.items()}


def stored_arguments(path: Path) -> list[str]:
    """Return the command-line arguments that generate an image file again.

    Raises:
        OptionError: if the file has no settings of this program.
    """
    settings = _read_settings(path)
    try:
        request = GenerationRequest.from_json(settings[_REQUEST])
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"--from_png {path}: the stored settings are invalid: {error}") from None
    arguments = []
    for name, value in {**settings[_OPTIONS], **request.as_options()}.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments.append(f"--{name}={value}")  # one argument, as the value may begin with "-"
    return arguments


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OptionError(f"--from_png {path}: no such file")
    texts = read_texts(path, "--from_png")
    if _SETTINGS not in texts:
        prompt = texts.get("prompt", "not stored either")
        raise OptionError(
            f"--from_png {path}: the file wasn't written by this suite's sdxl_gen_img.py and "
            f"stores no settings; its prompt is: {prompt}"
        )
    try:
        settings = json.loads(texts[_SETTINGS])
        is_valid = isinstance(settings[_OPTIONS], dict) and isinstance(settings[_REQUEST], dict)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if not is_valid:
        raise OptionError(f"--from_png {path}: the stored settings are invalid")
    return settings


def with_stored_arguments(argv: list[str]) -> list[str]:
    """Return the command line with the arguments that --from_png stands for.

    They come first, so that the user's own arguments win.
    """
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != "--from_png":
            continue
        if not equals:
            if i + 1 == len(argv):
                continue  # argparse reports the missing value
            value = argv[i + 1]
        return [*stored_arguments(Path(value).expanduser()), *argv]
    return argv
