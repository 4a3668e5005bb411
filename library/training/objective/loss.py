"""Loss of each sample, and its weights by signal-to-noise ratio (SNR).

Shapes: B samples, C, H and W of the latents. Everything is float32. Pure functions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from library.models.noise_schedule import NUM_TIMESTEPS, NoiseSchedule
from library.training.options.objective import LossOptions

_MAX_SNR = 1000.0  # keeps the ratios of nearly clean timesteps finite


def sample_losses(
    prediction: Tensor,
    target: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    options: LossOptions,
    *,
    v_prediction: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the weighted loss of each sample: [B], float32.

    Args:
        prediction: of the U-Net, [B, C, H, W].
        target: what it should be, [B, C, H, W].
        timesteps: [B].
        schedule: the noise schedule.
        options: type and weights of the loss.
        v_prediction: whether the target is the velocity instead of the noise.
        mask: weight of each pixel, [B, 8H, 8W] in 0..1.
    """
    threshold = None
    if options.loss_type in ("huber", "smooth_l1"):
        threshold = huber_threshold(
            timesteps,
            schedule,
            options.huber_schedule,
            c=options.huber_c,
            scale=options.huber_scale,
        )
    elements = element_loss(prediction.float(), target.float(), options.loss_type, threshold)
    if mask is not None:
        elements = elements * latent_mask(mask, (elements.shape[2], elements.shape[3]))
    losses = elements.mean(dim=(1, 2, 3))
    snr = schedule.snr.to(timesteps.device)[timesteps]
    if options.min_snr_gamma:
        losses = losses * min_snr_weight(snr, options.min_snr_gamma, v_prediction=v_prediction)
    if options.scale_v_pred_loss_like_noise_pred:
        losses = losses * noise_like_weight(snr)
    if options.v_pred_like_loss:
        losses = losses * v_like_weight(snr, options.v_pred_like_loss)
    if options.debiased_estimation_loss:
        losses = losses * debiased_weight(snr, v_prediction=v_prediction)
    return losses


def element_loss(
    prediction: Tensor, target: Tensor, loss_type: str, threshold: Tensor | None
) -> Tensor:
    """Return the loss of each element: [B, C, H, W].

    Args:
        prediction: [B, C, H, W].
        target: [B, C, H, W].
        loss_type: l2, l1, huber or smooth_l1.
        threshold: where huber and smooth_l1 turn from squared to absolute, [B].

    Source: Charbonnier et al. 1994 for the smooth form; contract: training_math.md section 3.
    """
    difference = prediction - target
    if loss_type == "l2":
        return difference**2
    if loss_type == "l1":
        return difference.abs()
    assert threshold is not None
    c = threshold[:, None, None, None]
    smooth = 2 * ((difference**2 + c**2).sqrt() - c)
    return smooth if loss_type == "smooth_l1" else c * smooth


def latent_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the mean of a mask over each latent's pixels: [B, height, width] -> [B, 1, *size].

    The loss isn't normalized by it.
    """
    return F.interpolate(mask[:, None].float(), size=size, mode="area")


def huber_threshold(
    timesteps: Tensor, schedule: NoiseSchedule, kind: str, *, c: float, scale: float
) -> Tensor:
    """Return the threshold at each timestep, [B]: constant, falling to c, or by the SNR.

    Args:
        timesteps: [B].
        schedule: the noise schedule.
        kind: constant, exponential or snr.
        c: the threshold, or where it ends.
        scale: factor of the threshold; not used by the kind snr.
    """
    if kind == "constant":
        return torch.full(timesteps.shape, c * scale, device=timesteps.device)
    if kind == "exponential":
        rate = -math.log(c) / NUM_TIMESTEPS
        return torch.exp(-rate * timesteps) * scale
    alpha_bar = schedule.alpha_bar.to(timesteps.device)[timesteps]
    sigma = (
        (1 - alpha_bar) / alpha_bar
    ).sqrt()  # infinite under zero terminal SNR, where the threshold becomes c
    return (1 - c) / (1 + sigma) ** 2 + c


def min_snr_weight(snr: Tensor, gamma: float, *, v_prediction: bool) -> Tensor:
    """Return the weight of each sample's loss under Min-SNR-gamma, [B].

    Nearly clean timesteps have a huge SNR and would dominate; capping it at `gamma` evens them out:
    min(snr, gamma) / snr when predicting noise, min(snr, gamma) / (snr + 1) when predicting
    velocity.

    Args:
        snr: of each sample's timestep, [B]; above 0, or 0 only with v_prediction.
        gamma: the cap, in units of SNR.
        v_prediction: whether the model predicts velocity.

    Source: Hang et al. 2023, arXiv:2303.09556.
    """
    denominator = snr + 1 if v_prediction else snr
    return snr.clamp(max=gamma) / denominator


def noise_like_weight(snr: Tensor) -> Tensor:
    """Return the weights of a velocity loss like a noise loss: snr / (snr + 1), [B]."""
    snr = snr.clamp(max=_MAX_SNR)
    return snr / (snr + 1)


def v_like_weight(snr: Tensor, strength: float) -> Tensor:
    """Return the weights that add a velocity loss: 1 + strength (snr + 1) / snr, [B]."""
    snr = snr.clamp(max=_MAX_SNR)
    return 1 + strength * (snr + 1) / snr


def debiased_weight(snr: Tensor, *, v_prediction: bool) -> Tensor:
    """Return the debiasing weight: 1 / sqrt(snr), for velocity 1 / (snr + 1), [B].

    Source: Yu et al. 2024, arXiv:2310.08442.
    """
    snr = snr.clamp(max=_MAX_SNR)
    return 1 / (snr + 1) if v_prediction else snr.rsqrt()
