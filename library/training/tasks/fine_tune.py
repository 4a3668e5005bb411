"""FineTune: the base model's own weights are trained, and a whole checkpoint is saved."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.options import CacheOptions, CaptionOptions
from library.errors import NotFinite
from library.files import replace_folder, temporary_name
from library.models.checkpoint.key_maps import FILE_PREFIXES, PARTS
from library.models.checkpoint.writer import ModuleTensors, save_diffusers, save_single_file
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText, TextConditioning, clip_body, module_name
from library.models.unet import block_of
from library.options import Options
from library.param_group import ParamGroup
from library.training.distributed.sharding import is_sharded, whole_tensors
from library.training.options.optimizer import OptimizerOptions
from library.training.options.run import RunOptions
from library.training.options.tasks import FineTuneOptions
from library.training.saving.metadata import RunFacts
from library.training.tasks.base import Task, cached_text
from library.training.trainable import Trainable

_ENCODERS = ("text_encoder_1", "text_encoder_2")


class ModelPart(Trainable):
    """The model's weights, as far as they are trained; saved as a whole checkpoint."""

    def __init__(
        self,
        models: SdxlModels,
        groups: Sequence[ParamGroup],
        save_model_as: str,
        *,
        v_prediction: bool,
        zero_terminal_snr: bool,
    ):
        """Args: groups: parameters by their names in single files."""
        self._models, self._groups, self._kind = models, list(groups), save_model_as
        self._v_prediction, self._zero_terminal_snr = v_prediction, zero_terminal_snr
        self._tensors = {name: p for group in groups for name, p in group.parameters.items()}
        self._joined: Mapping[str, Tensor] | None = None

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._tensors

    @contextmanager
    def whole(self) -> Iterator[None]:
        self._joined = whole_tensors(self._tensors) if is_sharded(self._tensors.values()) else None
        yield
        self._joined = None

    def values(self) -> Mapping[str, Tensor]:
        return super().values() if self._joined is None else self._joined

    def groups(self) -> list[ParamGroup]:
        return self._groups

    def after_step(self) -> None:
        pass

    def file_bytes(self, dtype: torch.dtype | None) -> int:
        """The whole model: what is trained, and what is taken over."""
        item = None if dtype is None else torch.empty((), dtype=dtype).element_size()
        size = 0
        for part in PARTS:
            for name, tensor in self._models.checkpoint.tensors(part).items():
                own = self._tensors.get(_prefix(part) + name, tensor)
                size += tensor.numel() * (item or own.element_size())
        return size

    def path(self, stem: Path) -> Path:
        return stem if self._kind.startswith("diffusers") else stem.with_name(f"{stem.name}.{self._kind}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        bad = [name for name, tensor in self.values().items() if not tensor.isfinite().all()]
        if bad:
            raise NotFinite(f"{stem}: not saved, as {len(bad)} of its tensors aren't finite ({', '.join(bad[:5])})")
        checkpoint, is_v, is_zero = self._models.checkpoint, self._v_prediction, self._zero_terminal_snr
        if self._kind.startswith("diffusers"):
            changed = {part: {**checkpoint.tensors(part), **tensors} for part, tensors in self._changed().items()}
            temporary = temporary_name(stem)
            try:
                save_diffusers(
                    temporary, checkpoint, changed, self._models.tokenizers, dtype=dtype, v_prediction=is_v, zero_terminal_snr=is_zero
                )  # fmt: skip
                replace_folder(temporary, stem)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return stem
        path = self.path(stem)
        save_single_file(
            path, checkpoint, self._changed(), metadata, dtype=dtype, v_prediction=is_v, zero_terminal_snr=is_zero
        )
        return path

    def _changed(self) -> ModuleTensors:
        """What was trained, by part and module name; of a text encoder all, as files keep some of its tensors joined."""
        changed: dict[str, dict[str, torch.Tensor]] = {}
        for part in PARTS:
            prefix = _prefix(part)
            trained = {n.removeprefix(prefix): p for n, p in self.values().items() if n.startswith(prefix)}
            if trained:
                own = {} if part == "unet" else self._models.checkpoint.tensors(part)
                changed[part] = {**own, **trained}
        if self._models.has_own_vae:
            changed["vae"] = self._models.stored("vae")
        return changed


def _prefix(part: str) -> str:
    """What the names of a part's parameters begin with; module names behind it."""
    return FILE_PREFIXES["unet"] if part == "unet" else f"{part}."


class FineTune(Task):
    """The U-Net by block, and the text encoders if asked for."""

    tracker_name = "finetuning"
    modelspec_kind = ""
    default_title = "Checkpoint"
    is_terse = True  # its files have modelspec alone

    def __init__(
        self,
        models: SdxlModels,
        options: FineTuneOptions,
        *,
        lr: float,
        num_tokens: int,
        text_is_cached: bool,
        weighted_captions: bool = False,
        text_stops_at: int | None = None,
        v_prediction: bool = False,
        zero_terminal_snr: bool = False,
    ):
        """Args: lr: the base learning rate. text_is_cached: captions come encoded, and the text encoders aren't needed."""
        self._models, self._num_tokens, self._weighted = models, num_tokens, weighted_captions
        self._encoders = () if text_is_cached else models.text_layers
        self.unet = models.unet
        self.compute_dtype = models.precision.compute
        groups = _unet_groups(self.unet, options.block_lrs, lr)
        if options.train_text_encoder:
            for number, (encoder, own) in enumerate(zip(self._encoders, options.text_encoder_lrs, strict=True), 1):
                rate = lr if own is None else own
                parameters = _encoder_parameters(encoder, number)
                if rate and parameters:
                    groups.append(ParamGroup(f"text_encoder{number}", parameters, rate, text_stops_at))
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        self._trains_text = any(group.name.startswith("text_encoder") for group in groups)
        kind = options.kind(is_folder=models.checkpoint.is_folder)
        self.parts = [ModelPart(models, groups, kind, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)]

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "FineTune":
        return cls(
            models,
            options[FineTuneOptions],
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            text_is_cached=options[CacheOptions].text,
            weighted_captions=options[CaptionOptions].weighted_captions,
            text_stops_at=options[RunOptions].stop_text_encoder_training,
            v_prediction=bool(options[ModelOptions].v_parameterization or models.checkpoint.v_prediction),
            zero_terminal_snr=bool(options[ModelOptions].zero_terminal_snr or models.checkpoint.zero_terminal_snr),
        )

    @classmethod
    def trained_parts(cls, options: Options) -> frozenset[str]:
        chosen, lr = options[FineTuneOptions], options[OptimizerOptions].learning_rate
        parts = {"unet"} if any(chosen.block_lrs or (lr,)) else set()
        for part, own in zip(_ENCODERS, chosen.text_encoder_lrs, strict=True):
            if chosen.train_text_encoder and (lr if own is None else own):
                parts.add(part)
        return frozenset(parts)

    def modules(self) -> list[nn.Module]:
        return [self.unet, *self._encoders]

    def encode_text(self, batch: Batch) -> TextConditioning:
        if batch.text is not None:
            return cached_text(batch.text, self.compute_dtype)
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            text = self._models.encode_texts(batch.captions, self._num_tokens, weighted=self._weighted)
        # Encoders that are trained compute in float32.
        return TextConditioning.of(EncodedText(*(part.to(self.compute_dtype) for part in text)))

    def metadata(self, options: Options, facts: RunFacts) -> dict[str, str]:
        return {}


def _unet_groups(unet: nn.Module, block_lrs: Sequence[float] | None, lr: float) -> list[ParamGroup]:
    """One group, or with --block_lr one for each block whose rate isn't 0. The others are frozen: no gradient, no state."""
    prefix = FILE_PREFIXES["unet"]
    if block_lrs is None:
        parameters = {prefix + name: parameter for name, parameter in unet.named_parameters()}
        return [ParamGroup("unet", parameters, lr)] if lr else []
    groups = []
    for block, rate in enumerate(block_lrs):
        members = {prefix + n: p for n, p in unet.named_parameters() if rate and block_of(n) == block}
        if members:
            groups.append(ParamGroup(f"block{block}", members, rate))
    return groups


def _encoder_parameters(encoder: nn.Module, number: int) -> dict[str, nn.Parameter]:
    """All that the result depends on: the first encoder's last layer and final norm don't reach it."""
    last = len(clip_body(encoder).encoder.layers) - 1
    unused = (f"text_model.encoder.layers.{last}.", "text_model.final_layer_norm.") if number == 1 else ()
    names = {name: module_name(encoder, name) for name, _ in encoder.named_parameters()}
    return {
        f"{_ENCODERS[number - 1]}.{names[name]}": parameter
        for name, parameter in encoder.named_parameters()
        if not names[name].startswith(unused)
    }
