"""Deep Shrink: early steps see a shrunk feature map, so that a large image gets one composition.

This module doesn't import torch. Source: contract, training_math.md section 10.
"""

import math
from dataclasses import dataclass

from library.options import OptionGroup, option


@dataclass(frozen=True)
class DeepShrinkOptions(OptionGroup):
    """Deep Shrink: large images whose composition is generated on a shrunk feature map."""

    ds_depth_1: int | None = option(
        None,
        "input block before which the feature map is shrunk; turns Deep Shrink on",
        at_least=0,
        at_most=8,
    )
    ds_timesteps_1: int = option(
        650, "shrink at --ds_depth_1 down to this timestep", at_least=0, at_most=1000
    )
    ds_depth_2: int | None = option(
        None, "a second such block, for the timesteps that follow", at_least=0, at_most=8
    )
    ds_timesteps_2: int = option(
        650, "shrink at --ds_depth_2 down to this timestep", at_least=0, at_most=1000
    )
    ds_ratio: float = option(0.5, "factor of the feature map's sides", above=0, at_most=1)


@dataclass(frozen=True)
class DeepShrink:
    """Where and when the feature map is shrunk.

    The fields are keys of the settings in image files: don't rename them.

    Attributes:
        depth_1: index of the input block before which the map is shrunk first.
        timesteps_1: the map is shrunk at depth_1 down to this timestep.
        depth_2: a second such block, for the timesteps that follow. None: there is only one.
        timesteps_2: the map is shrunk at depth_2 down to this timestep.
        ratio: factor of the map's sides.
    """

    depth_1: int = 3
    timesteps_1: int = 650
    depth_2: int | None = None
    timesteps_2: int = 650
    ratio: float = 0.5

    @classmethod
    def from_options(cls, options: DeepShrinkOptions) -> "DeepShrink":
        """Return the settings of the options, with the default depth if none is given."""
        return cls(
            depth_1=cls.depth_1 if options.ds_depth_1 is None else options.ds_depth_1,
            timesteps_1=options.ds_timesteps_1,
            depth_2=options.ds_depth_2,
            timesteps_2=options.ds_timesteps_2,
            ratio=options.ds_ratio,
        )

    def invalid_reason(self, width: int, height: int) -> str | None:
        """Return why an image of this size in pixels can't be generated; None if it can."""
        for depth in (self.depth_1, self.depth_2):
            if depth is None:
                continue
            # Block 0 is the first convolution. Blocks 3 and 6 halve the map of later blocks.
            side = min(width, height) // 8 >> max(0, depth - 1) // 3
            if int(side * self.ratio) < 1:
                least = math.ceil(1000 / side) / 1000
                return (
                    f"Deep Shrink with ratio {self.ratio:g} leaves nothing of the feature map of "
                    f"{side} cells that block {depth} sees of a {width}x{height} image; "
                    f"use a ratio of {least:g} or more"
                )
        return None

    def block_at(self, timestep: float) -> int | None:
        """Return the input block before which the map is shrunk; None if it isn't shrunk."""
        if timestep >= self.timesteps_1:
            return self.depth_1
        if timestep >= self.timesteps_2:
            return self.depth_2
        return None
