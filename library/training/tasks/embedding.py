"""EmbeddingTask: Textual Inversion trains the vectors of one placeholder token; the models are frozen."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.errors import OptionError, RunError
from library.log import log
from library.models.checkpoint.reader import open_tensors
from library.models.sdxl import SdxlModels
from library.models.textual_inversion import PlaceholderToken, first_rows
from library.param_group import ParamGroup
from library.safetensors_io import save_tensors
from library.training.options.tasks import EmbeddingOptions
from library.training.tasks.base import Task, TaskSettings
from library.training.trainable import Trainable

_NAMES = ("clip_l", "clip_g")  # of an embedding file's tensors


class TrainableToken(Trainable):
    """The vectors of one placeholder token."""

    def __init__(
        self,
        token: PlaceholderToken,
        lr: float,
        extension: str,
        *,
        suffix: str = "",
        last_step: int | None = None,
    ):
        """Initialize the trainable.

        Args:
            token: the token, added to the models.
            lr: the learning rate; 0: the token isn't trained.
            extension: the ending of its files, without a dot.
            suffix: what follows the run's name in the names of its files.
            last_step: optimizer steps after which it is frozen; None: never.
        """
        group = ParamGroup("token", token.rows, lr, "token", last_step)
        super().__init__([group] if lr else [], extension)
        self._token, self._suffix = token, suffix

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._token.rows

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}{self._suffix}.{self._extension}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = self.path(stem)
        save_tensors(path, embedding_tensors(self._token, dtype), metadata)
        return path


def embedding_tensors(token: PlaceholderToken, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of an embedding file: clip_l [n, 768] and clip_g [n, 1280].

    Args:
        token: the token.
        dtype: the dtype of the tensors; None: float32.
    """
    return {
        name: rows.detach().to("cpu", dtype or torch.float32) for name, rows in token.rows.items()
    }


def add_placeholder_token(
    models: SdxlModels, word: str, init_word: str | None, count: int, weights: Path | None = None
) -> PlaceholderToken:
    """Add a placeholder token to the models' tokenizers and text encoders.

    Args:
        models: the base model.
        word: the token's text in captions.
        init_word: words whose embeddings the vectors start from, in turn; None: the mean of all.
        count: the number of vectors.
        weights: an embedding file that the vectors start from.

    Raises:
        OptionError: the token can't be added, or the file doesn't fit.
    """
    if models.checkpoint.unet.takes_score:
        raise OptionError(
            f"{models.checkpoint.path}: a placeholder token needs both text encoders, and the refiner has one"
        )
    if init_word and models.device.type != "meta":
        num_tokens = len(models.tokenizers[0].ids(init_word))
        if num_tokens != count:
            log.warning(
                "%r has %d tokens for %d vectors: they are taken in turn",
                init_word,
                num_tokens,
                count,
            )
    rows = first_rows(models.tokenizers, models.text_layers, init_word, count)
    if weights is not None:
        rows = _read_rows(weights, rows)
    vectors = [row.to(models.device, models.precision.trained) for row in rows]
    return PlaceholderToken(models.tokenizers, models.text_layers, word, vectors)


def _read_rows(path: Path, initial: list[Tensor]) -> list[Tensor]:
    """Return the vectors in a file, clip_l and clip_g; one that the file lacks keeps its initial values."""
    try:
        file = open_tensors(path, mapped=False)
        saved = {name: file[name].float() for name in _NAMES if name in file.shapes}
    except RunError as error:
        raise OptionError(f"--weights {error}") from None
    if not saved:
        raise OptionError(
            f"--weights {path}: it has neither clip_l nor clip_g, so it is not an embedding for SDXL"
        )
    rows = []
    for name, start in zip(_NAMES, initial, strict=True):
        row = saved.get(name, start)
        if row.shape != start.shape:
            raise OptionError(
                f"--weights {path}: {name} is {list(row.shape)}; {list(start.shape)} is needed: "
                f"--num_vectors_per_token is {len(start)}"
            )
        if not row.isfinite().all():
            raise OptionError(f"--weights {path}: {name} contains NaN or Inf")
        rows.append(row)
    return rows


class EmbeddingTask(Task[tuple[EmbeddingOptions]]):
    """Trains one placeholder token for both text encoders."""

    option_groups = (EmbeddingOptions,)
    tracker_name = "textual_inversion"
    modelspec_kind = "/textual-inversion"
    default_title = "TextualInversion"

    def __init__(self, models: SdxlModels, settings: TaskSettings, groups: tuple[EmbeddingOptions]):
        super().__init__(models, settings, groups)
        (options,) = groups
        assert options.token_string is not None
        token = add_placeholder_token(
            models,
            options.token_string,
            options.init_word,
            options.num_vectors_per_token,
            options.weights,
        )
        self.trainables = [TrainableToken(token, settings.lr, options.save_model_as)]

    def modules(self) -> list[nn.Module]:
        return [self.unet, *self._encoders]
