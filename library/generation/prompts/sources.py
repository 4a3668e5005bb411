"""Prompt sources: the prompts of the command line, of a file, or stored in images. No torch here."""

from dataclasses import dataclass
from pathlib import Path

from library.errors import OptionError
from library.generation.init_images import list_images
from library.generation.metadata import read_texts
from library.generation.options import PromptOptions


@dataclass(frozen=True)
class PromptSource:
    """A prompt as the user wrote it, with its options.

    Attributes:
        text: the prompt.
        where: what to call it in messages.
        init_image_index: index of the image of --image_path that stores the prompt and is its init
            image. None: each image uses the next init image.
    """

    text: str
    where: str
    init_image_index: int | None = None


def read_prompts(prompts: PromptOptions, image_path: Path | None) -> list[PromptSource]:
    """Return the prompts of the options; none with --interactive.

    Args:
        prompts: where prompts come from.
        image_path: image or folder whose stored prompts are used if there are no others.

    Raises:
        OptionError: if there is no prompt or a file can't be read.
    """
    if prompts.interactive:
        return []
    if prompts.from_file is not None:
        return _prompts_in_file(prompts.from_file)
    if prompts.prompt is not None:
        return [PromptSource(prompts.prompt, "--prompt")]
    if image_path is None:
        raise OptionError("no prompt: use --prompt, --from_file, --from_png or --interactive")
    files = list_images([image_path], "--image_path")
    return [_stored_prompt(path, i) for i, path in enumerate(files)]


def _prompts_in_file(path: Path) -> list[PromptSource]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise OptionError(f"--from_file {path}: the file is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise OptionError(f"--from_file {path}: can't be read: {error.strerror}") from None
    prompts = []
    for i, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompts.append(PromptSource(line, f"{path}, line {i}"))
    if not prompts:
        raise OptionError(f"--from_file {path}: the file contains no prompt")
    return prompts


def _stored_prompt(path: Path, index: int) -> PromptSource:
    """Return the prompt that an image stores."""
    texts = read_texts(path, "--image_path")
    if "prompt" not in texts:
        raise OptionError(
            f"--image_path {path}: the image stores no prompt; use --prompt or --from_file"
        )
    text = texts["prompt"]
    negative = texts.get("negative-prompt", "")
    if negative:
        text += f" --n {negative}"
    return PromptSource(text, str(path), index)
