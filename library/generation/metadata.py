"""Metadata: what a picture file says of how it was drawn: the contract's PNG texts, and all that draws it again."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import OptionError
from library.generation.request import GenerationRequest
from library.log import log
from library.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image

_SETTINGS = "settings"  # JSON: the drawing, and the options that differ from their defaults
_EXIF_IFD, _COMMENT = 0x8769, 0x9286  # where webp and jpeg keep the texts
_UNICODE = b"UNICODE\0"
_MOST_EXIF = 65_500  # bytes of it in a jpeg file


def texts_of(drawing: GenerationRequest, options: Options) -> dict[str, str]:
    """What is stored with a picture."""
    kept = options.changed(lambda spec: spec.stored_in_image)
    settings = {"drawing": drawing.as_json(), "options": kept}
    return {**drawing.texts(), _SETTINGS: json.dumps(settings, ensure_ascii=False, default=str)}


def save_arguments(texts: Mapping[str, str], image_format: str) -> dict[str, Any]:
    """The arguments with which Pillow stores the texts in a file of this format."""
    if image_format == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for name, text in texts.items():
            info.add_itxt(name, text) if not text.isascii() else info.add_text(name, text)
        return {"pnginfo": info}
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_COMMENT] = _comment(texts)
    if image_format == "webp":
        return {"exif": exif, "lossless": True}
    if len(exif.tobytes()) > _MOST_EXIF:  # what draws the picture again says the rest too
        exif.get_ifd(_EXIF_IFD)[_COMMENT] = _comment({_SETTINGS: texts[_SETTINGS]})
    if len(exif.tobytes()) > _MOST_EXIF:
        log.warning(
            "a jpeg picture can't hold so long a prompt: nothing is stored in it; --image_format png or webp can"
        )
        exif = Image.Exif()
    return {"exif": exif, "quality": 95}


def _comment(texts: Mapping[str, str]) -> bytes:
    return _UNICODE + json.dumps(dict(texts), ensure_ascii=False).encode("utf-16-be")


def read_texts(path: Path, flag: str) -> dict[str, str]:
    """The texts in a picture; none where it has none. Raises OptionError if it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _texts_in(image)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise OptionError(f"{flag} {path}: can't be read as a picture: {error}") from None


def _texts_in(image: "Image") -> dict[str, str]:
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        found = json.loads(comment.removeprefix(_UNICODE).decode("utf-16-be"))
        return {str(name): str(text) for name, text in found.items()}
    texts = getattr(image, "text", {})
    return {name: str(text) for name, text in texts.items()}


def words_of(path: Path) -> list[str]:
    """The command line that draws a picture again. Raises OptionError."""
    settings = _settings_in(path)
    try:
        drawing = GenerationRequest.from_json(settings["drawing"])
    except (KeyError, TypeError, ValueError) as error:
        raise OptionError(f"--from_png {path}: what is stored in it can't be read: {error}") from None
    words = []
    for name, value in {**settings["options"], **drawing.as_options()}.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words.append(f"--{name}={value}")  # in one word, as it may begin with a dash
    return words


def _settings_in(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OptionError(f"--from_png {path}: no such file")
    texts = read_texts(path, "--from_png")
    try:
        settings = json.loads(texts[_SETTINGS])
        if not isinstance(settings["options"], dict) or not isinstance(settings["drawing"], dict):
            raise ValueError
        return settings
    except KeyError:
        raise OptionError(
            f"--from_png {path}: sdxl_gen_img.py of this suite didn't draw it; its prompt is: {texts.get('prompt', 'not there either')}"
        ) from None
    except ValueError:
        raise OptionError(f"--from_png {path}: what is stored in it can't be read") from None


def with_stored_words(argv: list[str]) -> list[str]:
    """The words of the command line, behind those that --from_png stands for: the user's own win."""
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == "--from_png" and (equals or place + 1 < len(argv)):
            return [*words_of(Path(value if equals else argv[place + 1]).expanduser()), *argv]
    return argv
