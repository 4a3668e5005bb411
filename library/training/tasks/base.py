"""Task: what one script trains, and how its forward differs from the others'. Part: one of the things that it trains."""

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.models.control import ControlInputs
from library.models.sdxl import SdxlModels, WeightPatch
from library.models.size_conditioning import conditioning_vector
from library.models.text_encoders import EncodedText, TextConditioning
from library.models.unet import UNet
from library.options import Options
from library.training.objective.noise import NoisedLatents, velocity
from library.training.objective.prediction import Objective
from library.training.saving.metadata import RunFacts
from library.training.trainable import Trainable


class Task:
    """The base of all tasks: text is encoded by the subclass; prediction and target have SDXL's defaults.

    Attributes:
        tracker_name: folder of the run's logs.
        modelspec_kind: what its files are, behind the architecture: "/lora".
        default_title: their title where no name is given.
    """

    tracker_name: str
    modelspec_kind: str
    default_title: str
    is_terse: bool = False  # --no_metadata

    parts: list[Trainable]
    unet: UNet
    compute_dtype: torch.dtype

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "Task":
        raise NotImplementedError

    @classmethod
    def trained_parts(cls, options: Options) -> frozenset[str]:
        """The model's own parts that are trained: "unet", "text_encoder_1", "text_encoder_2"."""
        return frozenset()

    @classmethod
    def change(cls, models: SdxlModels, options: Options) -> WeightPatch | None:
        """What is done to the base model when it is loaded. Args: models: without weights."""
        return None

    def metadata(self, options: Options, facts: RunFacts) -> dict[str, str]:
        """The ss_ keys of the saved files that don't change during the run."""
        raise NotImplementedError

    def modules(self) -> list[nn.Module]:
        """What the step holds: everything with parameters that the forward passes through."""
        raise NotImplementedError

    def encode_text(self, batch: Batch) -> TextConditioning:
        raise NotImplementedError

    def predict(self, noisy: NoisedLatents, text: TextConditioning, batch: Batch) -> Tensor:
        """What the U-Net makes of the noisy latents: [B, 4, H/8, W/8]."""
        seen, vector = self.model_input(noisy, batch), self.vector(text, batch)
        extra = None if batch.conditioning is None else self.control_inputs(batch.conditioning)
        return self.unet(seen, noisy.timesteps, text.context, vector, extra)

    def control_inputs(self, conditions: Tensor) -> ControlInputs | None:
        """How conditions, [B, 3, H, W] in -1..1, steer the U-Net's blocks; None where nothing is trained for them."""
        return None

    def model_input(self, noisy: NoisedLatents, batch: Batch) -> Tensor:
        """What the U-Net sees, [B, 4, H/8, W/8]; of inpainting models [B, 9, H/8, W/8]."""
        seen = noisy.latents if batch.inpaint_channels is None else torch.cat([noisy.latents, batch.inpaint_channels], dim=1)
        return seen.to(self.compute_dtype)

    def vector(self, text: TextConditioning, batch: Batch) -> Tensor:
        """What the U-Net is told of text and sizes: [B, 2816], or a refiner's [B, 2560]."""
        target = batch.target_sizes
        if self.unet.config.takes_score:
            assert batch.aesthetic_scores is not None
            target = batch.aesthetic_scores[:, None]
        return conditioning_vector(text.pooled, batch.original_sizes, batch.crop_top_lefts, target)

    def target(self, noisy: NoisedLatents, text: TextConditioning, batch: Batch, objective: Objective) -> Tensor:
        """What it should make of them."""
        if objective.v_prediction:
            return velocity(noisy.clean, noisy.noise, objective.schedule.at(noisy.timesteps))
        return noisy.noise


def cached_text(text: EncodedText, dtype: torch.dtype) -> TextConditioning:
    """The conditioning of a batch whose text outputs come from a cache."""
    return TextConditioning.of(EncodedText(*(part.to(dtype) for part in text)))
