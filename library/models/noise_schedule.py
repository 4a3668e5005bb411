"""NoiseSchedule: how much of the image is left at each timestep, for training and for drawing.

T = 1000 timesteps; alpha_bar [T] is the share of the image's variance, 1 - alpha_bar that of the noise's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012


@dataclass(frozen=True)
class NoiseSchedule:
    """SDXL's schedule ("scaled linear"), with zero terminal SNR if asked for.

    The tables have the same bits on every CPU: sums, products and quotients of float32 are rounded exactly everywhere, and
    what a CPU's kernels may round in their own way (even steps, square roots) is computed in float64 and rounded once.

    Attributes:
        betas, alpha_bar: [T], float32.
        snr: alpha_bar / (1 - alpha_bar), [T]. With zero terminal SNR it is that of the changed schedule, 0 at the last
            timestep (sd-scripts takes it before the change; docs/differences.md).

    Source: Ho et al. 2020, arXiv:2006.11239; Rombach et al. 2022; Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """

    betas: Tensor
    alpha_bar: Tensor

    @property
    def snr(self) -> Tensor:
        return self.alpha_bar / (1 - self.alpha_bar)

    @classmethod
    def sdxl(cls, *, zero_terminal_snr: bool = False) -> "NoiseSchedule":
        betas = _even_steps(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS) ** 2
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        if zero_terminal_snr:
            root = alpha_bar.double().sqrt().float()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            ratios = (root**2)[1:] / (root**2)[:-1]
            betas = 1 - torch.cat([root[:1] ** 2, ratios])
            alpha_bar = torch.cumprod(1 - betas, dim=0)
        return cls(betas, alpha_bar)

    def to(self, device: torch.device) -> "NoiseSchedule":
        return NoiseSchedule(self.betas.to(device), self.alpha_bar.to(device))

    def at(self, timesteps: Tensor) -> Tensor:
        """alpha_bar of each timestep, shaped to multiply latents: [B, 1, 1, 1], on the timesteps' device."""
        return self.alpha_bar.to(timesteps.device)[timesteps][:, None, None, None]


def _even_steps(start: float, end: float, count: int) -> Tensor:
    """torch.linspace in float32 as kernels with a fused multiply-add round it, whatever the CPU has: [count].

    Both ends and the step are float32 numbers. The first half is counted from the start and the second half from the end.
    """
    first, last = torch.tensor([start, end], dtype=torch.float32)
    step = (last - first) / (count - 1)
    i = torch.arange(count, dtype=torch.float64)
    from_start = first.double() + step.double() * i
    from_end = last.double() - step.double() * (count - 1 - i)
    return torch.where(i < count // 2, from_start, from_end).float()
