"""Drawing: everything that makes one picture what it is, the run's model and networks apart. No torch here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.generation.deep_shrink import DeepShrink
from library.generation.gradual_latent import GradualLatent


@dataclass(frozen=True)
class GenerationRequest:
    """One picture to draw.

    Attributes:
        prompt2, negative2: for the second text encoder; None: the same.
        raw_prompt: the line as it was written.
        clip_prompt: kept with the picture, nothing else.
        width, height: in pixels.
        original_…, crop_…: what the model is told; None: the picture's own size, no crop.
        negative_scale: None: the negative prompt is what guidance leads away from.
        multipliers: of the networks; None: the run's.
        source, mask, guides: files.
        number: place in the run, from 0; row: the line that it is of.
    """

    prompt: str
    negative: str
    prompt2: str | None
    negative2: str | None
    raw_prompt: str
    clip_prompt: str | None
    width: int
    height: int
    original_width: int | None
    original_height: int | None
    original_width_negative: int | None
    original_height_negative: int | None
    crop_top: int | None
    crop_left: int | None
    steps: int
    seed: int
    sampler: str
    scale: float
    negative_scale: float | None
    guidance_rescale: float
    strength: float
    multipliers: tuple[float, ...] | None
    shrink: DeepShrink | None
    growth: GradualLatent | None
    source: Path | None
    mask: Path | None
    guides: tuple[Path, ...]
    number: int
    row: int

    @property
    def is_guided(self) -> bool:
        return self.scale > 1

    def small_stage(self, *, scale: float, steps: int, strength: float | None) -> "GenerationRequest":
        """The first stage of highres fix: smaller, with its own steps; sides are multiples of 32."""

        def scaled(value: int | None) -> int | None:
            return None if value is None else int(value * scale + 0.5)

        return dataclasses.replace(
            self, width=int(self.width * scale + 0.5) // 32 * 32, height=int(self.height * scale + 0.5) // 32 * 32,
            original_width=scaled(self.original_width), original_height=scaled(self.original_height),
            original_width_negative=scaled(self.original_width_negative),
            original_height_negative=scaled(self.original_height_negative),
            crop_top=scaled(self.crop_top), crop_left=scaled(self.crop_left),
            steps=steps, strength=self.strength if strength is None else strength,
        )  # fmt: skip

    @property
    def settings(self) -> tuple[Any, ...]:
        """What pictures of one batch have in common."""
        own = {
            "prompt",
            "negative",
            "prompt2",
            "negative2",
            "raw_prompt",
            "clip_prompt",
            "seed",
            "source",
            "guides",
            "number",
            "row",
        }
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        return (*shared.values(), self.source is None)

    def texts(self) -> dict[str, str]:
        """What is stored with a picture: the contract's names, and all else under names of ours."""
        found = {
            "prompt": self.prompt, "seed": self.seed, "sampler": self.sampler, "steps": self.steps, "scale": self.scale,
            "negative-prompt": self.negative, "negative-scale": self.negative_scale, "clip-prompt": self.clip_prompt,
            "raw-prompt": self.raw_prompt, "original-height": self.original_height, "original-width": self.original_width,
            "original-height-negative": self.original_height_negative, "original-width-negative": self.original_width_negative,
            "crop-top": self.crop_top, "crop-left": self.crop_left,
        }  # fmt: skip
        return {name: str(value) for name, value in found.items()}

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        values = dataclasses.asdict(self)
        for name in ("source", "mask"):
            values[name] = None if values[name] is None else str(values[name])
        values["guides"] = [str(path) for path in self.guides]
        return values

    def as_options(self) -> dict[str, Any]:
        """The options of the command line that draw it; None: such an option isn't given."""
        multipliers = None if self.multipliers is None else ",".join(map(str, self.multipliers))
        more = {"n": self.negative, "n2": self.negative2, "c": self.clip_prompt, "am": multipliers}
        prompt = " ".join([self.prompt, *(f"--{letters} {text}" for letters, text in more.items() if text is not None)])
        shrink = {"depth_1": None} if self.shrink is None else dataclasses.asdict(self.shrink)
        growth = {"timesteps": None} if self.growth is None else dataclasses.asdict(self.growth)
        if "unsharp" in growth:
            growth["unsharp_params"] = growth.pop("unsharp")
        same = (
            "prompt2", "original_width", "original_height", "original_width_negative", "original_height_negative", "crop_top",
            "crop_left", "steps", "seed", "sampler", "scale", "negative_scale", "guidance_rescale", "strength",
        )  # fmt: skip
        return {
            "prompt": prompt, "W": self.width, "H": self.height, **{name: getattr(self, name) for name in same},
            **{f"ds_{name}": value for name, value in shrink.items()},
            **{f"gradual_latent_{name}": value for name, value in growth.items()},
            "image_path": self.source, "mask_path": self.mask, "guide_image_path": list(self.guides) or None,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """Raises TypeError, KeyError or ValueError for what as_json didn't make."""
        made = dict(values)
        for name in ("source", "mask"):
            made[name] = None if made[name] is None else Path(made[name])
        made["guides"] = tuple(map(Path, made["guides"]))
        made["multipliers"] = None if made["multipliers"] is None else tuple(made["multipliers"])
        made["shrink"] = None if made["shrink"] is None else DeepShrink(**made["shrink"])
        made["growth"] = None if made["growth"] is None else GradualLatent(**made["growth"])
        return cls(**made)
