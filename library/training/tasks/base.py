"""Task: what one script trains, and how its forward pass differs from that of the others."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.dataset_config import ConditioningKind
from library.models.control import ControlInputs
from library.models.sdxl import SdxlModels, WeightPatch
from library.models.size_conditioning import conditioning_vector
from library.models.text_encoders import EncodedText, TextConditioning
from library.options import OptionGroup
from library.param_group import ParamGroup
from library.training.objective.noise import NoisedLatents, velocity
from library.training.objective.prediction import Objective
from library.training.trainable import Trainable


@dataclass(frozen=True)
class TaskSettings:
    """Values that every task takes from the options that all training scripts share.

    Attributes:
        lr: the base learning rate.
        num_tokens: a multiple of 75, at which captions are truncated.
        total_steps: optimizer steps of the run.
        text_is_cached: captions are encoded before training, so the text encoders aren't needed.
        weighted_captions: read (word:1.2) in captions as weights.
        text_last_step: optimizer steps after which the text encoders are frozen; None: never.
        v_prediction: the model predicts velocity.
        zero_terminal_snr: the model is trained on a schedule with zero terminal SNR.
    """

    lr: float
    num_tokens: int
    total_steps: int = 1
    text_is_cached: bool = False
    weighted_captions: bool = False
    text_last_step: int | None = None
    v_prediction: bool = False
    zero_terminal_snr: bool = False


G = TypeVar("G", bound=tuple[OptionGroup, ...])


class Task(ABC, Generic[G]):
    """Base class of all tasks. A subclass says what is trained; text, prediction and target have SDXL's defaults.

    The type parameter is a tuple of `option_groups`' instances.

    Class attributes:
        option_groups: the option groups that only this task's script has.
        conditioning_kind: what the images of conditioning_data_dir are.
        tracker_name: the folder of the run's logs.
        modelspec_kind: what follows the architecture in the metadata of its files: "/lora".
        default_title: the files' title in the metadata where no name is given.

    Attributes:
        is_terse: its files have only the metadata that other programs need.
        trainables: what is trained and saved.
        unet: the U-Net that the forward pass calls.
        compute_dtype: the dtype of activations.
    """

    option_groups: ClassVar[tuple[type[OptionGroup], ...]]
    conditioning_kind: ClassVar[ConditioningKind] = "masks"
    tracker_name: ClassVar[str]
    modelspec_kind: ClassVar[str]
    default_title: ClassVar[str]

    is_terse: bool = True
    trainables: Sequence[Trainable]

    def __init__(self, models: SdxlModels, settings: TaskSettings, groups: G):
        """Build what is trained on top of the models. A subclass sets `trainables`.

        Args:
            models: the base model; on the meta device nothing is loaded.
            settings: values that all tasks take.
            groups: the instances of `option_groups`.
        """
        self._models, self._settings = models, settings
        self._encoders: Sequence[Any] = () if settings.text_is_cached else models.text_layers
        self.unet = models.unet
        self.compute_dtype = models.precision.compute

    @classmethod
    def trained_components(cls, lr: float, groups: G) -> frozenset[str]:
        """Return the components of the base model that are trained: "unet", "text_encoder_1", "text_encoder_2".

        Args:
            lr: the base learning rate.
            groups: the instances of `option_groups`.
        """
        return frozenset()

    @classmethod
    def weight_patch(cls, models: SdxlModels, groups: G) -> WeightPatch | None:
        """Return what is done to the base model's weights when they are loaded, if anything.

        Args:
            models: the base model on the meta device.
            groups: the instances of `option_groups`.
        """
        return None

    def param_groups(self) -> list[ParamGroup]:
        """Return the trained parameters of all trainables by learning rate."""
        return [group for trainable in self.trainables for group in trainable.groups()]

    @property
    def num_tokens(self) -> int:
        """Tokens at which captions are truncated."""
        return self._settings.num_tokens

    def describe(self) -> list[str]:
        """Return a table of what is trained at which learning rate."""
        groups = self.param_groups()
        width = max(len(name) for name in ("trained", *(group.name for group in groups)))
        lines = [f"{'trained'.ljust(width)}  tensors     parameters  learning rate"]
        for group in groups:
            numel = sum(parameter.numel() for parameter in group.parameters.values())
            until = "" if group.last_step is None else f" until step {group.last_step}"
            lines.append(
                f"{group.name.ljust(width)}  {len(group.parameters):7d}  {numel:13,}  {group.lr:g}{until}"
            )
        return lines

    @cached_property
    def trains_text(self) -> bool:
        """Whether gradients pass through the text encoders."""
        return any(group.needs_text_gradients for group in self.param_groups())

    def metadata(self, common: Mapping[str, str]) -> dict[str, str]:
        """Return the ss_ keys of the saved files that don't change during the run.

        Args:
            common: those of every script; empty if `is_terse`.
        """
        return dict(common)

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """Return everything with parameters that the forward pass goes through."""

    def encode_text(self, batch: Batch) -> TextConditioning:
        """Return the text conditioning of a batch: from the cache, or encoded, with gradients if they are needed."""
        if batch.text is not None:
            text = batch.text
        else:
            with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
                text = self._models.encode_texts(
                    batch.captions,
                    self._settings.num_tokens,
                    weighted=self._settings.weighted_captions,
                )
        # Caches are float32, and so are text encoders that are trained.
        return TextConditioning.of(EncodedText(*(part.to(self.compute_dtype) for part in text)))

    def predict(self, noisy: NoisedLatents, text: TextConditioning, batch: Batch) -> Tensor:
        """Return the U-Net's prediction for the noised latents, [B, 4, H/8, W/8]."""
        seen, vector = self.model_input(noisy, batch), self.vector(text, batch)
        control = None if batch.conditioning is None else self.control_inputs(batch.conditioning)
        return self.unet(seen, noisy.timesteps, text.context, vector, control)

    def control_inputs(self, conditions: Tensor) -> ControlInputs | None:
        """Return the control inputs of the U-Net's blocks; None where nothing is trained for conditions.

        Args:
            conditions: conditioning images, [B, 3, H, W] in -1..1.
        """
        return None

    def model_input(self, noisy: NoisedLatents, batch: Batch) -> Tensor:
        """Return the U-Net's input: [B, 4, H/8, W/8], or [B, 9, H/8, W/8] for inpainting models."""
        seen = (
            noisy.latents
            if batch.inpaint_channels is None
            else torch.cat([noisy.latents, batch.inpaint_channels], dim=1)
        )
        return seen.to(self.compute_dtype)

    def vector(self, text: TextConditioning, batch: Batch) -> Tensor:
        """Return the vector conditioning of pooled text and sizes: [B, 2816], or a refiner's [B, 2560]."""
        target = batch.target_sizes
        if self.unet.config.takes_score:
            assert batch.aesthetic_scores is not None
            target = batch.aesthetic_scores[:, None]
        return conditioning_vector(text.pooled, batch.original_sizes, batch.crop_top_lefts, target)

    def target(
        self, noisy: NoisedLatents, text: TextConditioning, batch: Batch, objective: Objective
    ) -> Tensor:
        """Return the training target, [B, 4, H/8, W/8]: the noise, or the velocity for v-prediction."""
        if objective.v_prediction:
            return velocity(noisy.clean, noisy.noise, objective.schedule.at(noisy.timesteps))
        return noisy.noise
