"""GenerationRequest: all settings of one image except the model and its networks. No torch here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.generation.deep_shrink import DeepShrink
from library.generation.gradual_latent import GradualLatent

# Fields whose keys in image files differ from their names. Other fields have the same key. The keys
# are a file format: an image written by any version can be generated again.
_FILE_KEYS = {
    "deep_shrink": "shrink",
    "gradual_latent": "growth",
    "init_image": "source",
    "guide_images": "guides",
    "index": "number",
    "prompt_index": "row",
}

# Fields in which the images of one batch may differ.
_PER_IMAGE = {
    "prompt",
    "negative",
    "prompt2",
    "negative2",
    "raw_prompt",
    "clip_prompt",
    "seed",
    "init_image",
    "guide_images",
    "index",
    "prompt_index",
}

# Fields that are also command-line options of the same name.
_SAME_OPTIONS = (
    "prompt2",
    "original_width",
    "original_height",
    "original_width_negative",
    "original_height_negative",
    "crop_top",
    "crop_left",
    "steps",
    "seed",
    "sampler",
    "scale",
    "negative_scale",
    "guidance_rescale",
    "strength",
)


@dataclass(frozen=True)
class GenerationRequest:
    """One image to generate.

    Attributes:
        prompt: for both text encoders.
        negative: the negative prompt.
        prompt2: prompt of the second text encoder. None: `prompt`.
        negative2: negative prompt of the second text encoder. None: `negative`.
        raw_prompt: the line as the user wrote it.
        clip_prompt: stored with the image and not used otherwise.
        width: in pixels.
        height: in pixels.
        original_width: size conditioning, like the fields that follow. None: the image's width.
        original_height: None: the image's height.
        original_width_negative: for the negative prompt. None: that of the prompt.
        original_height_negative: for the negative prompt. None: that of the prompt.
        crop_top: size conditioning. None: 0.
        crop_left: size conditioning. None: 0.
        steps: number of denoising steps.
        seed: of all random numbers.
        sampler: name of the sampler.
        scale: guidance scale.
        negative_scale: strength of the negative prompt. None: guidance is relative to the negative
            prompt.
        guidance_rescale: see `Guidance`.
        strength: share of the steps that run on an init image.
        multipliers: of the networks. None: those of the run.
        deep_shrink: None: off.
        gradual_latent: None: off.
        init_image: file of the init image. None: the image starts from noise.
        mask: file of the mask.
        guide_images: one file per control net.
        index: of the image within the run, from 0.
        prompt_index: of the image's prompt within the run, from 0.
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
    deep_shrink: DeepShrink | None
    gradual_latent: GradualLatent | None
    init_image: Path | None
    mask: Path | None
    guide_images: tuple[Path, ...]
    index: int
    prompt_index: int

    @property
    def is_guided(self) -> bool:
        return self.scale > 1

    def first_stage(
        self, *, scale: float, steps: int, strength: float | None
    ) -> "GenerationRequest":
        """Return the first stage of highres fix: a smaller image.

        Args:
            scale: factor of the sides, which are cut to multiples of 32.
            steps: number of steps.
            strength: None: that of this request.
        """

        def scaled(value: int | None) -> int | None:
            return None if value is None else int(value * scale + 0.5)

        return dataclasses.replace(
            self,
            width=int(self.width * scale + 0.5) // 32 * 32,
            height=int(self.height * scale + 0.5) // 32 * 32,
            original_width=scaled(self.original_width),
            original_height=scaled(self.original_height),
            original_width_negative=scaled(self.original_width_negative),
            original_height_negative=scaled(self.original_height_negative),
            crop_top=scaled(self.crop_top),
            crop_left=scaled(self.crop_left),
            steps=steps,
            strength=self.strength if strength is None else strength,
        )

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """The settings that all images of a batch share."""
        shared: list[Any] = [self.init_image is None]
        for field in dataclasses.fields(self):
            if field.name not in _PER_IMAGE:
                shared.append(getattr(self, field.name))
        return tuple(shared)

    def texts(self) -> dict[str, str]:
        """Return the texts that image files store under the contract's names."""
        values = {
            "prompt": self.prompt,
            "seed": self.seed,
            "sampler": self.sampler,
            "steps": self.steps,
            "scale": self.scale,
            "negative-prompt": self.negative,
            "negative-scale": self.negative_scale,
            "clip-prompt": self.clip_prompt,
            "raw-prompt": self.raw_prompt,
            "original-height": self.original_height,
            "original-width": self.original_width,
            "original-height-negative": self.original_height_negative,
            "original-width-negative": self.original_width_negative,
            "crop-top": self.crop_top,
            "crop-left": self.crop_left,
        }
        return {name: str(value) for name, value in values.items()}

    def as_json(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold, under the keys of image files."""
        values = dataclasses.asdict(self)
        for name in ("init_image", "mask"):
            values[name] = None if values[name] is None else str(values[name])
        values["guide_images"] = [str(path) for path in self.guide_images]
        return {_FILE_KEYS.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """Return the request of values that `as_json` returned.

        Raises:
            TypeError: if the values are something else. Likewise KeyError and ValueError.
        """
        names = {key: name for name, key in _FILE_KEYS.items()}
        fields = {names.get(key, key): value for key, value in values.items()}
        for name in ("init_image", "mask"):
            if fields[name] is not None:
                fields[name] = Path(fields[name])
        fields["guide_images"] = tuple(Path(path) for path in fields["guide_images"])
        if fields["multipliers"] is not None:
            fields["multipliers"] = tuple(fields["multipliers"])
        if fields["deep_shrink"] is not None:
            fields["deep_shrink"] = DeepShrink(**fields["deep_shrink"])
        if fields["gradual_latent"] is not None:
            fields["gradual_latent"] = GradualLatent(**fields["gradual_latent"])
        return cls(**fields)

    def as_options(self) -> dict[str, Any]:
        """Return the command-line options that generate this image; None: the option isn't given."""
        options = {name: getattr(self, name) for name in _SAME_OPTIONS}
        options["prompt"] = self._prompt_with_options()
        options["W"] = self.width
        options["H"] = self.height
        options["ds_depth_1"] = None
        if self.deep_shrink is not None:
            for name, value in dataclasses.asdict(self.deep_shrink).items():
                options[f"ds_{name}"] = value
        options["gradual_latent_timesteps"] = None
        if self.gradual_latent is not None:
            for name, value in dataclasses.asdict(self.gradual_latent).items():
                option = "unsharp_params" if name == "unsharp" else name
                options[f"gradual_latent_{option}"] = value
        options["image_path"] = self.init_image
        options["mask_path"] = self.mask
        options["guide_image_path"] = list(self.guide_images) or None
        return options

    def _prompt_with_options(self) -> str:
        """Return the prompt, and what only options within a prompt can set."""
        words = [self.prompt, f"--n {self.negative}"]
        if self.negative2 is not None:
            words.append(f"--n2 {self.negative2}")
        if self.clip_prompt is not None:
            words.append(f"--c {self.clip_prompt}")
        if self.multipliers is not None:
            words.append("--am " + ",".join(str(value) for value in self.multipliers))
        return " ".join(words)
