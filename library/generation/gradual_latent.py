"""Gradual Latent: latents start small and grow during denoising, inside the steps of euler_a.

Shapes: B images, h and w of latents. Source: contract, training_math.md section 10.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import Mistake
from library.options import OptionGroup, option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRADUAL_SAMPLERS = ("euler_a", "k_euler_a")
_SIDE_MULTIPLE = 8  # sides of grown latents are multiples of this


@dataclass(frozen=True)
class GradualLatentOptions(OptionGroup):
    """Gradual Latent: latents grow during denoising (euler_a)."""

    gradual_latent_timesteps: int | None = option(
        None,
        "latents start small and grow below this timestep; turns Gradual Latent on",
        at_least=0,
        at_most=1000,
    )
    gradual_latent_ratio: float = option(
        0.5, "factor of the latents' sides at the start", above=0, at_most=1
    )
    gradual_latent_ratio_step: float = option(
        0.125, "increase of the factor each time", above=0, at_most=1
    )
    gradual_latent_every_n_steps: int = option(
        3, "minimum number of steps from one increase to the next", at_least=1
    )
    gradual_latent_s_noise: float = option(
        1.0, "factor of the noise that is added where latents grow", at_least=0
    )
    gradual_latent_unsharp_params: str | None = option(
        None,
        "sharpen grown latents: size of the blur, its sigma, strength, and 1 (sharpen the next "
        "sample, usual) or 0 (this one): 3,0.5,0.5,1",
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.gradual_latent_unsharp_params is not None:
            try:
                read_unsharp(self.gradual_latent_unsharp_params)
            except ValueError as error:
                yield Mistake(
                    f"--gradual_latent_unsharp_params: {error}",
                    ("gradual_latent_unsharp_params",),
                )


def read_unsharp(text: str) -> tuple[int, float, float, bool]:
    """Read size,sigma,strength[,target].

    Returns:
        The blur's size and sigma, the strength, and whether the next sample is sharpened.

    Raises:
        ValueError: with what was expected.
    """
    parts = text.split(",")
    try:
        size, sigma, strength = int(parts[0]), float(parts[1]), float(parts[2])
        target = int(parts[3]) if len(parts) > 3 else 1
        is_valid = (
            len(parts) <= 4 and size >= 1 and size % 2 == 1 and sigma > 0 and target in (0, 1)
        )
    except (ValueError, IndexError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"expected size,sigma,strength[,0 or 1] with an odd size, such as 3,0.5,0.5,1, "
            f"got {text!r}"
        )
    return size, sigma, strength, target == 1


@dataclass(frozen=True)
class GradualLatent:
    """When and how latents grow.

    The fields are keys of the settings in image files: don't rename them.

    Attributes:
        timesteps: latents grow below this timestep.
        ratio: factor of the sides at the start.
        ratio_step: increase of the ratio each time.
        every_n_steps: minimum number of steps from one increase to the next.
        s_noise: factor of the noise that is added in steps in which latents grow.
        unsharp: size of the blur, sigma, strength, and whether the next sample is sharpened
            (`read_unsharp`). None: nothing is sharpened.
    """

    timesteps: int = 650
    ratio: float = 0.5
    ratio_step: float = 0.125
    every_n_steps: int = 3
    s_noise: float = 1.0
    unsharp: str | None = None

    @classmethod
    def from_options(cls, options: GradualLatentOptions) -> "GradualLatent":
        """Return the settings of the options, with the default timestep if none is given."""
        timesteps = options.gradual_latent_timesteps
        return cls(
            timesteps=cls.timesteps if timesteps is None else timesteps,
            ratio=options.gradual_latent_ratio,
            ratio_step=options.gradual_latent_ratio_step,
            every_n_steps=options.gradual_latent_every_n_steps,
            s_noise=options.gradual_latent_s_noise,
            unsharp=options.gradual_latent_unsharp_params,
        )

    def invalid_reason(self, width: int, height: int) -> str | None:
        """Return why an image of this size in pixels can't be generated; None if it can."""
        side = min(width, height) // 8
        if int(side * self.ratio) >= 1:
            return None
        least = math.ceil(1000 / side) / 1000
        return (
            f"Gradual Latent with ratio {self.ratio:g} leaves nothing of the {side} latent cells "
            f"of a {width}x{height} image; use a ratio of {least:g} or more"
        )

    def sizes_by_step(
        self, timesteps: Sequence[float], height: int, width: int
    ) -> list[tuple[int, int] | None]:
        """Return the (h, w) to which latents grow in each step; None: they keep their size.

        Args:
            timesteps: one per step.
            height: of the full latents.
            width: of the full latents.
        """
        sizes: list[tuple[int, int] | None] = []
        ratio = self.ratio
        last_growth = -self.every_n_steps
        for step, timestep in enumerate(timesteps):
            is_due = step - last_growth >= self.every_n_steps
            if timestep >= self.timesteps or ratio >= 1 or not is_due:
                sizes.append(None)
                continue
            ratio = min(ratio + self.ratio_step, 1.0)
            last_growth = step
            if ratio == 1:
                sizes.append((height, width))
            else:
                sizes.append((_scaled_side(height, ratio), _scaled_side(width, ratio)))
        return sizes

    def shrink(self, latents: "Tensor") -> "Tensor":
        """Shrink the initial latents: [B, 4, h, w] -> [B, 4, ratio * h, ratio * w]."""
        import torch.nn.functional as F

        small = F.interpolate(latents.float(), scale_factor=self.ratio, mode="bicubic")
        return small.to(latents.dtype)


def _scaled_side(side: int, ratio: float) -> int:
    return max(_SIDE_MULTIPLE, int(side * ratio) // _SIDE_MULTIPLE * _SIDE_MULTIPLE)


class _EulerStep(NamedTuple):
    """Quantities of one ancestral Euler step.

    Attributes:
        derivative: d = (x - x0) / sigma, [B, 4, h, w].
        dt: change of sigma in the deterministic part.
        noise_sigma: standard deviation of the noise that is added.
    """

    derivative: "Tensor"
    dt: "Tensor"
    noise_sigma: "Tensor"


class GrowingEuler:
    """An euler_a sampler in whose steps latents grow.

    It has the interface and the sigmas of Diffusers' EulerAncestralDiscreteScheduler.
    """

    order = 1

    def __init__(self, sampler: Any, gradual: GradualLatent, height: int, width: int):
        """Wrap an euler_a scheduler.

        Args:
            sampler: the scheduler.
            gradual: when and how latents grow.
            height: of the full latents.
            width: of the full latents.
        """
        self._sampler = sampler
        self._gradual = gradual
        self._full_size = (height, width)
        self._sizes: dict[float, tuple[int, int] | None] | None = None

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
        self._sizes = None

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
        """Return the next latents, which are larger than `latents` where they grow.

        Args:
            predicted: noise or velocity, [B, 4, h, w].
            timestep: of this step.
            latents: [B, 4, h, w].
            generator: of the noise.
            return_dict: as in Diffusers; a tuple is returned in any case.
        """
        from diffusers.utils.torch_utils import randn_tensor

        size = self._size_at(timestep)
        sample = latents.float()
        step = self._euler_step(predicted.float(), timestep, sample)
        unsharp = None
        if self._gradual.unsharp is not None:
            unsharp = read_unsharp(self._gradual.unsharp)
        if size is None:
            sample = sample + step.derivative * step.dt
        elif unsharp is None or unsharp[3]:
            sample = _sharpen(_resize(sample + step.derivative * step.dt, size), unsharp)
        else:
            sample = _sharpen(_resize(sample, size), unsharp)
            sample = sample + _resize(step.derivative, size) * step.dt
        noise = randn_tensor(
            tuple(sample.shape), dtype=predicted.dtype, device=sample.device, generator=generator
        )
        factor = 1.0 if size is None else self._gradual.s_noise
        return ((sample + noise * factor * step.noise_sigma).to(latents.dtype),)

    def _size_at(self, timestep: "Tensor") -> tuple[int, int] | None:
        """Return the size to which latents grow at this timestep."""
        if self._sizes is None:  # the first step of an image
            remaining = [float(t) for t in self.timesteps if t <= timestep]
            sizes = self._gradual.sizes_by_step(remaining, *self._full_size)
            self._sizes = dict(zip(remaining, sizes, strict=True))
        return self._sizes[float(timestep)]

    def _euler_step(self, predicted: "Tensor", timestep: "Tensor", sample: "Tensor") -> _EulerStep:
        sigma, next_sigma = self._sigmas(timestep)
        if self.config.prediction_type == "v_prediction":
            clean = predicted * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1)
        else:
            clean = sample - sigma * predicted
        noise_sigma = (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5
        dt = (next_sigma**2 - noise_sigma**2) ** 0.5 - sigma
        return _EulerStep((sample - clean) / sigma, dt, noise_sigma)

    def _sigmas(self, timestep: "Tensor") -> "tuple[Tensor, Tensor]":
        """Return the sigma of a timestep and the next one, on the CPU."""
        i = int((self.timesteps == timestep).nonzero()[0])
        return self._sampler.sigmas[i], self._sampler.sigmas[i + 1]


def _resize(x: "Tensor", size: tuple[int, int]) -> "Tensor":
    import torch.nn.functional as F

    return F.interpolate(x, size=size, mode="bicubic")


def _sharpen(x: "Tensor", unsharp: tuple[int, float, float, bool] | None) -> "Tensor":
    """Return x + strength * (x - blurred x). The blur mirrors x at its edges."""
    import torch
    import torch.nn.functional as F

    if unsharp is None:
        return x
    size, sigma, strength, _ = unsharp
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = torch.exp(-((offsets / sigma) ** 2) / 2)
    weights = (weights / weights.sum()).to(x.device, torch.float32)
    kernel = weights.expand(x.shape[1], 1, 1, size)
    half = size // 2
    blurred = F.pad(x, (half, half, half, half), mode="reflect")
    blurred = F.conv2d(blurred, kernel, groups=x.shape[1])
    blurred = F.conv2d(blurred, kernel.transpose(2, 3), groups=x.shape[1])
    return x + strength * (x - blurred)
