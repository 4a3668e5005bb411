"""EmbeddingTask: Textual Inversion. The vectors of one new word are trained; models stay as they are."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.options import CaptionOptions
from library.errors import OptionError, RunError
from library.log import log
from library.models.checkpoint.reader import open_tensors
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.models.textual_inversion import PlaceholderToken, first_rows
from library.options import Options
from library.param_group import ParamGroup
from library.training.options.optimizer import OptimizerOptions
from library.training.options.tasks import EmbeddingOptions
from library.training.saving.metadata import RunFacts
from library.training.tasks.base import Task
from library.training.trainable import Trainable, write_part


class TokenPart(Trainable):
    """The vectors of one new word."""

    def __init__(
        self, token: PlaceholderToken, lr: float, extension: str, *, suffix: str = "", stops_at: float | None = None
    ):
        """Args: suffix: what its files' names have behind those of the run."""
        self._token, self._lr, self._extension, self._suffix, self._stops_at = token, lr, extension, suffix, stops_at

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._token.rows

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("token", self._token.rows, self._lr, self._stops_at)] if self._lr else []

    def after_step(self) -> None:
        pass

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}{self._suffix}.{self._extension}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = self.path(stem)
        write_part(path, embedding_tensors(self._token, dtype), metadata, None)
        return path


def embedding_tensors(token: PlaceholderToken, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """What an embedding file holds: clip_l [n, 768] and clip_g [n, 1280]. Args: dtype: float32 if None."""
    return {name: rows.detach().to("cpu", dtype or torch.float32) for name, rows in token.rows.items()}


def add_placeholder_token(
    models: SdxlModels, word: str, init_word: str | None, count: int, weights: Path | None = None
) -> PlaceholderToken:
    """Add a new word to the models' tokenizers and encoders. Raises OptionError if it can't be, or the file doesn't fit."""
    if models.checkpoint.unet.takes_score:
        raise OptionError(f"{models.checkpoint.path}: a new word needs both text encoders, and the refiner has one")
    if init_word and models.device.type != "meta" and (found := len(models.tokenizers[0].ids(init_word))) != count:
        log.warning("%r has %d tokens for %d vectors: they are taken in turn", init_word, found, count)
    rows = first_rows(models.tokenizers, models.text_layers, init_word, count)
    if weights is not None:
        rows = _read_rows(weights, rows)
    own = [vectors.to(models.device, models.precision.trained) for vectors in rows]
    return PlaceholderToken(models.tokenizers, models.text_layers, word, own)


def _read_rows(path: Path, like: list[Tensor]) -> list[Tensor]:
    """The vectors in a file, clip_l and clip_g; one that isn't there keeps its first values."""
    try:
        file = open_tensors(path, mapped=False)
        found = {name: file[name].float() for name in ("clip_l", "clip_g") if name in file.shapes}
    except RunError as error:
        raise OptionError(f"--weights {error}") from None
    if not found:
        raise OptionError(f"--weights {path}: it holds neither clip_l nor clip_g, so it is no embedding for SDXL")
    rows = [found.get(name, own) for name, own in zip(("clip_l", "clip_g"), like, strict=True)]
    for name, row, own in zip(("clip_l", "clip_g"), rows, like, strict=True):
        if row.shape != own.shape:
            raise OptionError(
                f"--weights {path}: {name} is {list(row.shape)}; {list(own.shape)} is needed: --num_vectors_per_token is {len(own)}"
            )
        if not row.isfinite().all():
            raise OptionError(f"--weights {path}: {name} holds numbers that aren't finite")
    return rows


class EmbeddingTask(Task):
    """One new word, for both encoders."""

    tracker_name = "textual_inversion"
    modelspec_kind = "/textual-inversion"
    default_title = "TextualInversion"
    is_terse = True  # its files have modelspec alone

    def __init__(
        self,
        models: SdxlModels,
        options: EmbeddingOptions,
        *,
        lr: float,
        num_tokens: int,
        weighted_captions: bool = False,
    ):
        assert options.token_string is not None
        self._models, self._num_tokens, self._weighted = models, num_tokens, weighted_captions
        self.unet = models.unet
        self.compute_dtype = models.precision.compute
        token = add_placeholder_token(
            models, options.token_string, options.init_word, options.num_vectors_per_token, options.weights
        )
        self.parts = [TokenPart(token, lr, options.save_model_as)]

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "EmbeddingTask":
        return cls(
            models,
            options[EmbeddingOptions],
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            weighted_captions=options[CaptionOptions].weighted_captions,
        )

    def modules(self) -> list[nn.Module]:
        return [self.unet, *self._models.text_encoders]

    def encode_text(self, batch: Batch) -> TextConditioning:
        return TextConditioning.of(self._models.encode_texts(batch.captions, self._num_tokens, weighted=self._weighted))

    def metadata(self, options: Options, facts: RunFacts) -> dict[str, str]:
        return {}
