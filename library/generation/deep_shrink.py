"""DeepShrink: early steps see a shrunk feature map, so that a large picture gets one composition. No torch here.

Source: contract, training_math.md section 10.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DeepShrink:
    """Where and when the feature map is shrunk.

    Attributes:
        depth_1, depth_2: input blocks before which it is; depth_2 None: one place only.
        timesteps_1, timesteps_2: the first is used down to timesteps_1, the second from there down to timesteps_2.
        ratio: factor of the sides.
    """

    depth_1: int = 3
    timesteps_1: int = 650
    depth_2: int | None = None
    timesteps_2: int = 650
    ratio: float = 0.5

    def problem(self, width: int, height: int) -> str | None:
        """Why a picture of this size in pixels can't be drawn so."""
        for depth in (self.depth_1, self.depth_2):
            # Block 0 is the first convolution; blocks 3 and 6 halve the map, for those behind them.
            side = 0 if depth is None else min(width, height) // 8 >> max(0, depth - 1) // 3
            if depth is not None and int(side * self.ratio) < 1:
                return (
                    f"Deep Shrink by {self.ratio:g} leaves nothing of a map of {side} cells, as block {depth} sees a picture of "
                    f"{width}x{height}; take a larger ratio, {math.ceil(1000 / side) / 1000:g} or more"
                )
        return None

    def block_at(self, timestep: float) -> int | None:
        """The input block before which the map is shrunk at this timestep; None: it isn't."""
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None
