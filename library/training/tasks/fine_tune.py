"""FineTune: trains the base model's own weights, and saves a complete checkpoint."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from library.files import replace_folder, temporary_name
from library.models.checkpoint.key_maps import FILE_PREFIXES, PARTS
from library.models.checkpoint.writer import ModuleTensors, save_diffusers, save_single_file
from library.models.sdxl import SdxlModels
from library.models.text_encoders import clip_body, module_name
from library.models.unet import block_of
from library.param_group import Component, ParamGroup
from library.safetensors_io import check_finite
from library.training.distributed.sharding import full_tensors, is_sharded
from library.training.options.tasks import FineTuneOptions
from library.training.tasks.base import Task, TaskSettings
from library.training.trainable import Trainable, bytes_in

_ENCODERS: tuple[Component, Component] = ("text_encoder_1", "text_encoder_2")


class TrainableModel(Trainable):
    """The trained weights of the base model, saved as a complete checkpoint."""

    def __init__(
        self,
        models: SdxlModels,
        groups: Sequence[ParamGroup],
        save_model_as: str,
        *,
        v_prediction: bool,
        zero_terminal_snr: bool,
    ):
        """Initialize the trainable.

        Args:
            models: the base model.
            groups: the trained parameters by their names in single files.
            save_model_as: the format of its files.
            v_prediction: written to the files, as is zero_terminal_snr.
            zero_terminal_snr: the schedule has zero terminal SNR.
        """
        self._is_folder = save_model_as in ("diffusers", "diffusers_safetensors")
        super().__init__(groups, save_model_as)
        self._models = models
        self._v_prediction, self._zero_terminal_snr = v_prediction, zero_terminal_snr
        self._tensors = {name: p for group in groups for name, p in group.parameters.items()}
        self._gathered: Mapping[str, Tensor] | None = None

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._tensors

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if is_sharded(self._tensors.values()):
            self._gathered = full_tensors(self._tensors)
        yield
        self._gathered = None

    def full_tensors(self) -> Mapping[str, Tensor]:
        return super().full_tensors() if self._gathered is None else self._gathered

    def file_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the approximate size of the complete model, the weights that aren't trained included."""
        size = 0
        for component in PARTS:
            for name, tensor in self._models.checkpoint.tensors(component).items():
                size += bytes_in([self._tensors.get(_prefix(component) + name, tensor)], dtype)
        return size

    def path(self, stem: Path) -> Path:
        return stem if self._is_folder else super().path(stem)

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        check_finite(stem, self.full_tensors())
        path, checkpoint = self.path(stem), self._models.checkpoint
        is_v, is_zero = self._v_prediction, self._zero_terminal_snr
        if not self._is_folder:
            save_single_file(
                path,
                checkpoint,
                self._changed(),
                metadata,
                dtype=dtype,
                v_prediction=is_v,
                zero_terminal_snr=is_zero,
            )
            return path
        components = {}
        for component, tensors in self._changed().items():
            components[component] = {**checkpoint.tensors(component), **tensors}
        temporary = temporary_name(path)
        try:
            save_diffusers(
                temporary,
                checkpoint,
                components,
                self._models.tokenizers,
                dtype=dtype,
                v_prediction=is_v,
                zero_terminal_snr=is_zero,
            )
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path

    def _changed(self) -> ModuleTensors:
        """Return the tensors that differ from the base model's, by component and module name.

        Of a trained text encoder these are all tensors, because files store some of them joined.
        """
        changed: dict[str, dict[str, torch.Tensor]] = {}
        for component in PARTS:
            prefix = _prefix(component)
            trained = {}
            for name, tensor in self.full_tensors().items():
                if name.startswith(prefix):
                    trained[name.removeprefix(prefix)] = tensor
            if trained:
                kept = {} if component == "unet" else self._models.checkpoint.tensors(component)
                changed[component] = {**kept, **trained}
        if self._models.has_own_vae:
            changed["vae"] = self._models.stored("vae")
        return changed


def _prefix(component: str) -> str:
    """Return what precedes the module names in the names of a component's parameters."""
    return FILE_PREFIXES["unet"] if component == "unet" else f"{component}."


class FineTune(Task[tuple[FineTuneOptions]]):
    """Trains the U-Net by block, and the text encoders if asked."""

    option_groups = (FineTuneOptions,)
    tracker_name = "finetuning"
    modelspec_kind = ""
    default_title = "Checkpoint"

    def __init__(self, models: SdxlModels, settings: TaskSettings, groups: tuple[FineTuneOptions]):
        super().__init__(models, settings, groups)
        (options,) = groups
        trained = _unet_groups(self.unet, options.block_lrs, settings.lr)
        if options.train_text_encoder:
            trained += _text_encoder_groups(self._encoders, options, settings)
        for group in trained:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)
        model = TrainableModel(
            models,
            trained,
            options.kind(is_folder=models.checkpoint.is_folder),
            v_prediction=settings.v_prediction,
            zero_terminal_snr=settings.zero_terminal_snr,
        )
        self.trainables = [model]

    @classmethod
    def trained_components(cls, lr: float, groups: tuple[FineTuneOptions]) -> frozenset[str]:
        (options,) = groups
        components: set[str] = set()
        if any(options.block_lrs or (lr,)):
            components.add("unet")
        if options.train_text_encoder:
            for component, text_lr in zip(_ENCODERS, options.text_encoder_lrs, strict=True):
                if lr if text_lr is None else text_lr:
                    components.add(component)
        return frozenset(components)

    def modules(self) -> list[nn.Module]:
        return [self.unet, *self._encoders]


def _text_encoder_groups(
    encoders: Sequence[nn.Module], options: FineTuneOptions, settings: TaskSettings
) -> list[ParamGroup]:
    """Return a group for each text encoder whose learning rate isn't 0."""
    groups = []
    for i, (encoder, text_lr) in enumerate(zip(encoders, options.text_encoder_lrs, strict=True)):
        lr = settings.lr if text_lr is None else text_lr
        parameters = _encoder_parameters(encoder, _ENCODERS[i])
        if lr and parameters:
            name = f"text_encoder{i + 1}"
            groups.append(ParamGroup(name, parameters, lr, _ENCODERS[i], settings.text_last_step))
    return groups


def _unet_groups(unet: nn.Module, block_lrs: Sequence[float] | None, lr: float) -> list[ParamGroup]:
    """Return one group, or with --block_lr a group for each block whose learning rate isn't 0.

    The other blocks are frozen: they have no gradient and no optimizer state.
    """
    prefix = FILE_PREFIXES["unet"]
    if block_lrs is None:
        parameters = {prefix + name: parameter for name, parameter in unet.named_parameters()}
        return [ParamGroup("unet", parameters, lr)] if lr else []
    members: list[dict[str, nn.Parameter]] = [{} for _ in block_lrs]
    for name, parameter in unet.named_parameters():
        members[block_of(name)][prefix + name] = parameter
    groups = []
    for block, block_lr in enumerate(block_lrs):
        if block_lr and members[block]:
            groups.append(ParamGroup(f"block{block}", members[block], block_lr))
    return groups


def _encoder_parameters(encoder: nn.Module, component: Component) -> dict[str, nn.Parameter]:
    """Return the parameters that the result depends on.

    The first encoder's last layer and final norm aren't used.
    """
    unused: tuple[str, ...] = ()
    if component == "text_encoder_1":
        last = len(clip_body(encoder).encoder.layers) - 1
        unused = (f"text_model.encoder.layers.{last}.", "text_model.final_layer_norm.")
    parameters = {}
    for own_name, parameter in encoder.named_parameters():
        name = module_name(encoder, own_name)
        if not name.startswith(unused):
            parameters[f"{component}.{name}"] = parameter
    return parameters
