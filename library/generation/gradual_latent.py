"""GradualLatent: latents start small and grow while they are drawn, inside the steps of euler_a.

Shapes: B pictures, h and w of latents. Source: contract, training_math.md section 10.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.generation.options import read_unsharp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CELLS = 8  # grown latents have sides of multiples of this


@dataclass(frozen=True)
class GradualLatent:
    """When and how latents grow.

    Attributes:
        timesteps: they grow below this timestep.
        ratio: the share of the sides that they start with; ratio_step: how much it grows at once.
        every_n_steps: least steps from one growth to the next.
        s_noise: factor of the noise of those steps.
        unsharp: size of the blur, sigma, strength, and whether it is the next sample that is sharpened; None: nothing is.
    """

    timesteps: int = 650
    ratio: float = 0.5
    ratio_step: float = 0.125
    every_n_steps: int = 3
    s_noise: float = 1.0
    unsharp: str | None = None

    def problem(self, width: int, height: int) -> str | None:
        """Why a picture of this size in pixels can't be drawn so."""
        side = min(width, height) // 8
        if int(side * self.ratio) >= 1:
            return None
        return (
            f"Gradual Latent at {self.ratio:g} leaves nothing of the {side} latent cells of a picture of {width}x{height}; "
            f"take a larger ratio, {math.ceil(1000 / side) / 1000:g} or more"
        )

    def growths(self, timesteps: Sequence[float], height: int, width: int) -> list[tuple[int, int] | None]:
        """The (h, w) to which latents grow in each step, of full latents of this size; None: they stay."""
        found: list[tuple[int, int] | None] = []
        ratio, last = self.ratio, -self.every_n_steps
        for step, timestep in enumerate(timesteps):
            if timestep < self.timesteps and ratio < 1 and step - last >= self.every_n_steps:
                ratio, last = min(ratio + self.ratio_step, 1.0), step
                sides = (max(_CELLS, int(side * ratio) // _CELLS * _CELLS) for side in (height, width))
                found.append((height, width) if ratio == 1 else (next(sides), next(sides)))
            else:
                found.append(None)
        return found

    def shrunk(self, latents: "Tensor") -> "Tensor":
        """The start: [B, 4, h, w] -> [B, 4, ratio * h, ratio * w]."""
        import torch.nn.functional as F

        return F.interpolate(latents.float(), scale_factor=self.ratio, mode="bicubic").to(latents.dtype)


class GrowingEuler:
    """euler_a in whose steps latents grow; it answers as Diffusers' EulerAncestralDiscreteScheduler does, whose sigmas it has."""

    order = 1

    def __init__(self, sampler: Any, growth: GradualLatent, height: int, width: int):
        """Args: height, width: of the full latents."""
        self._sampler, self._growth, self._full = sampler, growth, (height, width)
        self._growths: dict[float, tuple[int, int] | None] | None = None

    @property
    def timesteps(self) -> "Tensor":
        return self._sampler.timesteps

    @property
    def config(self) -> Any:
        return self._sampler.config

    @property
    def init_noise_sigma(self) -> Any:
        return self._sampler.init_noise_sigma

    def set_timesteps(self, steps: int) -> None:
        self._sampler.set_timesteps(steps)
        self._growths = None

    def add_noise(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        return self._sampler.add_noise(latents, noise, timesteps)

    def scale_model_input(self, latents: "Tensor", timestep: "Tensor") -> "Tensor":
        sigma, _ = self._sigmas(timestep)
        return latents / (sigma**2 + 1) ** 0.5

    def step(
        self,
        predicted: "Tensor",
        timestep: "Tensor",
        latents: "Tensor",
        generator: "list[torch.Generator] | torch.Generator | None" = None,
        return_dict: bool = False,
    ) -> "tuple[Tensor]":
        """The next latents, larger than `latents` where they grow. predicted, latents: [B, 4, h, w]."""
        from diffusers.utils.torch_utils import randn_tensor

        if self._growths is None:  # the first step of this picture
            left = [float(t) for t in self.timesteps if t <= timestep]
            self._growths = dict(zip(left, self._growth.growths(left, *self._full), strict=True))
        size = self._growths[float(timestep)]
        sigma, following = self._sigmas(timestep)
        sample, prediction = latents.float(), predicted.float()
        if self.config.prediction_type == "v_prediction":
            clean = prediction * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
        else:
            clean = sample - sigma * prediction
        added = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
        derivative, dt = (sample - clean) / sigma, (following**2 - added**2) ** 0.5 - sigma
        unsharp = None if self._growth.unsharp is None else read_unsharp(self._growth.unsharp)
        if size is None:
            sample = sample + derivative * dt
        elif unsharp is None or unsharp[3]:
            sample = _sharpened(_resized(sample + derivative * dt, size), unsharp)
        else:
            sample = _sharpened(_resized(sample, size), unsharp) + _resized(derivative, size) * dt
        noise = randn_tensor(tuple(sample.shape), dtype=predicted.dtype, device=sample.device, generator=generator)
        factor = 1.0 if size is None else self._growth.s_noise
        return ((sample + noise * factor * added).to(latents.dtype),)

    def _sigmas(self, timestep: "Tensor") -> "tuple[Tensor, Tensor]":
        """The sigma of a timestep and the one that follows, on the CPU."""
        place = int((self.timesteps == timestep).nonzero()[0])
        return self._sampler.sigmas[place], self._sampler.sigmas[place + 1]


def _resized(x: "Tensor", size: tuple[int, int]) -> "Tensor":
    import torch.nn.functional as F

    return F.interpolate(x, size=size, mode="bicubic")


def _sharpened(x: "Tensor", unsharp: tuple[int, float, float, bool] | None) -> "Tensor":
    """x + strength * (x - blurred x). The blur mirrors what lies beyond the edge."""
    import torch
    import torch.nn.functional as F

    if unsharp is None:
        return x
    size, sigma, strength, _ = unsharp
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-((places / sigma) ** 2) / 2)
    kernel = (weights / weights.sum()).to(x.device, torch.float32).expand(x.shape[1], 1, 1, size)
    half = size // 2
    blurred = F.pad(x, (half, half, half, half), mode="reflect")
    blurred = F.conv2d(blurred, kernel, groups=x.shape[1])
    blurred = F.conv2d(blurred, kernel.transpose(2, 3), groups=x.shape[1])
    return x + strength * (x - blurred)
