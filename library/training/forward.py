"""The one training forward, and the gradients of an optimizer step.

Everything that trains, validates or measures calls `DiffusionLoss`, which is what wrappers wrap.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.cache.latents import LATENT_CHANNELS
from library.errors import RunError
from library.models.inpainting import inpainting_channels, with_scaled_latents
from library.models.vae import PIXELS_PER_LATENT, scale_latents
from library.rng import SampleRng, seed_global_rng
from library.training.monitoring.metrics import MicrobatchLoss
from library.training.objective.loss import sample_losses
from library.training.objective.noise import add_training_noise
from library.training.objective.prediction import Objective
from library.training.optim.optimizer_step import OptimizerStep
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.tasks.base import Task

EncodeImages = Callable[[Tensor, Tensor], Tensor]
"""(images [B, 3, H, W] in -1..1, noise [B, 4, H/8, W/8]) -> raw latents"""


class DiffusionLoss(nn.Module):
    """The loss of each sample of a batch."""

    def __init__(
        self,
        task: Task[Any],
        objective: Objective,
        noise: NoiseOptions,
        loss: LossOptions,
        encode_images: EncodeImages,
    ):
        """Initialize the module.

        Args:
            task: how text is encoded, and what is predicted.
            objective: what the model predicts, and its noise schedule.
            noise: the options of noise and timesteps.
            loss: the options of the loss.
            encode_images: encodes images whose latents aren't cached.
        """
        super().__init__()
        self.held = nn.ModuleList(
            task.modules()
        )  # so that wrappers and optimizers see their parameters
        self._task, self._objective, self._noise, self._loss = task, objective, noise, loss
        self._encode_images = encode_images

    def forward(self, batch: Batch, rng: SampleRng, timesteps: Tensor | None = None) -> Tensor:
        """Return the weighted loss of each sample, [B], float32.

        Args:
            batch: the samples.
            rng: their random numbers.
            timesteps: [B]; None: random ones.
        """
        task, objective = self._task, self._objective
        latents = scale_latents(self._raw_latents(batch, rng))
        mask = self._mask(batch)
        if task.unet.config.is_inpainting:
            batch = dataclasses.replace(
                batch, inpaint_channels=self._inpainting_channels(batch, rng)
            )
        text = task.encode_text(batch)
        noisy = add_training_noise(latents, rng, objective.schedule, self._noise, timesteps)
        prediction = task.predict(noisy, text, batch)
        target = task.target(noisy, text, batch, objective)
        losses = sample_losses(
            prediction,
            target,
            noisy.timesteps,
            objective.schedule,
            self._loss,
            mask=mask,
            v_prediction=objective.v_prediction,
        )
        return losses * batch.weights

    def _mask(self, batch: Batch) -> Tensor | None:
        """Return the loss mask in pixels, [B, H, W] in 0..1.

        It is the red channel of conditioning images with --masked_loss, or the alpha channel.
        """
        if self._loss.masked_loss and batch.conditioning is not None:
            return batch.conditioning[:, 0] / 2 + 0.5
        return batch.masks

    @torch.no_grad()
    def _inpainting_channels(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return the mask and the masked image's latents, which an inpainting model sees: [B, 5, H/8, W/8], float32."""
        if batch.cached_inpaint_channels is not None:
            return with_scaled_latents(batch.cached_inpaint_channels)
        assert batch.images is not None and batch.inpaint_masks is not None
        noise = rng.normal("masked posterior", _latent_shape(batch.images))
        return inpainting_channels(
            batch.images, batch.inpaint_masks, lambda shown: self._encode_images(shown, noise)
        )

    @torch.no_grad()
    def _raw_latents(self, batch: Batch, rng: SampleRng) -> Tensor:
        """Return cached latents, or a new posterior sample of the images: [B, 4, H/8, W/8], float32."""
        if batch.latents is not None:
            return batch.latents
        assert batch.images is not None
        noise = rng.normal("posterior", _latent_shape(batch.images))
        latents = self._encode_images(batch.images, noise)
        if not latents.isfinite().all():
            bad = [
                path
                for path, own in zip(batch.paths, latents, strict=True)
                if not own.isfinite().all()
            ]
            raise RunError(
                f"the VAE gives latents that aren't finite, in float32 too, for {', '.join(bad)}; "
                "remove these images or give another --vae"
            )
        return latents


def _latent_shape(images: Tensor) -> tuple[int, int, int]:
    height, width = images.shape[2:]
    return LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def accumulate_gradients(
    optimizer_step: OptimizerStep,
    accumulation: Sequence[Batch],
    *,
    splits: int,
    seed: int,
    device: torch.device,
) -> list[MicrobatchLoss]:
    """Compute the gradients of an optimizer step, and return the losses of its micro-batches.

    Args:
        optimizer_step: accumulates the gradients; it has the training forward.
        accumulation: the micro-batches of the step.
        splits: parts that each micro-batch is computed in.
        seed: the run's seed.
        device: the device that trains.
    """
    losses = []
    for batch in accumulation:
        parts = batch.split(splits)
        for i, part in enumerate(parts):
            part = part.to(device)
            position = part.position
            if i < len(parts) - 1:
                position = position._replace(is_last_microbatch=False)
            # For random numbers inside modules, such as dropout.
            seed_global_rng(seed, position.epoch, position.microbatch_index, i)
            rng = SampleRng(seed, position.epoch, position.first_sample_index, len(part), device)
            with optimizer_step.accumulation(position):
                part_losses = optimizer_step.loss_module(part, rng)
                optimizer_step.backward(part_losses, position)
            losses.append(MicrobatchLoss(part.paths, part_losses.detach()))
    return losses
