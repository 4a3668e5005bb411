"""Options of sdxl_gen_img.py, networks apart. No torch here.

Names and meanings: contract, options.tsv. Those of our own say so in docs/differences.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.generation.sampler_options import SAMPLERS
from library.options import OptionGroup, option

SIDE = 32  # the U-Net halves latents twice, and latents are an eighth of the picture
DEFAULT_SIDE = 1024
MOST_SEED = 2**63 - 2  # that torch takes, with one to spare for the second stage of highres fix
GRADUAL_SAMPLERS = ("euler_a", "k_euler_a")


@dataclass(frozen=True)
class GenerationModelOptions(OptionGroup):
    """Model to draw with"""

    ckpt: str | None = option(None, "model: a .safetensors or .ckpt file, a Diffusers folder, a hub id, or a pattern (*) that one file fits")  # fmt: skip
    vae: str | None = option(None, "another VAE: a VAE file or whole checkpoint, a Diffusers folder, or a hub id")
    tokenizer_cache_dir: Path | None = option(
        None, "folder in which the two tokenizers are kept; unset: the model folder's, or those that come with this program"
    )  # fmt: skip
    fp16: bool = option(False, "draw in float16")
    bf16: bool = option(False, "draw in bfloat16; --fp16 wins")
    no_half_vae: bool = option(
        False, "run the VAE in float32; without it a black or broken picture is decoded again in float32"
    )
    v_parameterization: bool = option(
        False, "the model predicts velocity; known by itself where the checkpoint says so"
    )
    zero_terminal_snr: bool = option(
        False, "the model's last timestep is pure noise; known by itself where the checkpoint says so"
    )
    sdpa: bool = option(False, "PyTorch's attention, which is what is used anyway")
    xformers: bool = option(False, "xformers' attention in the U-Net, where xformers is installed; else PyTorch's")
    diffusers_xformers: bool = option(
        False, "xformers by Diffusers", no_effect="the U-Net isn't Diffusers'; --xformers is what asks for xformers"
    )
    opt_channels_last: bool = option(False, "channels-last memory", no_effect="convolutions always run so")
    compile: bool = option(
        False, "compile the U-Net's blocks: the first picture of a size takes minutes, the others less time"
    )
    vae_batch_size: float | None = option(
        None, "pictures that the VAE decodes at once; below 1 a share of the batch; unset: the batch", above=0
    )
    vae_slices: int | None = option(None, "the VAE's convolutions work on so many slices of the picture in turn: less memory, the same picture", at_least=1)  # fmt: skip
    vae_tiling: bool = option(
        False, "the VAE decodes overlapping tiles of 512 pixels: least memory, a slightly different picture"
    )

    @property
    def mixed_precision(self) -> str:
        return "fp16" if self.fp16 else "bf16" if self.bf16 else "no"

    def mistakes(self) -> Iterable[Mistake]:
        if self.ckpt is None:
            yield Mistake("--ckpt is missing: the SDXL model to draw with", ("ckpt",))
        if self.vae_batch_size is not None and self.vae_batch_size >= 1 and self.vae_batch_size % 1:
            yield Mistake(
                f"--vae_batch_size {self.vae_batch_size:g}: expected a whole number of pictures, or a share below 1",
                ("vae_batch_size",),
            )
        if self.vae_slices is not None and self.vae_tiling:
            yield Mistake("--vae_slices and --vae_tiling: take one of them", ("vae_slices", "vae_tiling"))


@dataclass(frozen=True)
class PromptOptions(OptionGroup):
    """Prompts to draw"""

    prompt: str | None = option(
        None, "what to draw; may hold options of its own, such as --w 832 (docs/generate.md)", stored_in_image=False
    )
    prompt2: str | None = option(None, "another prompt for the second text encoder; --p2 within a prompt wins")
    from_file: Path | None = option(None, "text file with a prompt on each line; blank lines and # lines are skipped; --prompt is ignored", stored_in_image=False)  # fmt: skip
    from_png: Path | None = option(
        None,
        "draw the picture of this file again: its options are taken, and those given beside it win",
        stored_in_image=False,
    )
    interactive: bool = option(
        False, "ask for prompts, one line each, until the end of input; --n_iter is 1", stored_in_image=False
    )
    no_preview: bool = option(
        False,
        "no window for pictures in --interactive",
        no_effect="no window is ever opened; each file's name is told",
        stored_in_image=False,
    )
    images_per_prompt: int = option(1, "pictures for each prompt", at_least=1, stored_in_image=False)
    n_iter: int = option(1, "times that the whole list of prompts is drawn", at_least=1, stored_in_image=False)
    seed: int | None = option(
        None,
        "seed of the pictures' seeds, and of one picture itself; random when unset",
        at_least=0,
        at_most=MOST_SEED,
        stored_in_image=False,
    )
    iter_same_seed: bool = option(False, "all prompts of a round have the same seeds", stored_in_image=False)
    clip_skip: int | None = option(
        None, "text encoder layers to skip", no_effect="SDXL always takes the last layer but one", at_least=1
    )
    max_embeddings_multiples: int | None = option(
        None, "most tokens of a prompt, in units of 75: what is longer is cut, and told; unset: no limit", at_least=1
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.from_file is not None and not self.from_file.is_file():
            yield Mistake(f"--from_file {self.from_file}: no such file", ("from_file",))
        if self.interactive and self.from_file is not None:
            yield Mistake("--interactive and --from_file: take one of them", ("interactive", "from_file"))


@dataclass(frozen=True)
class ImageOptions(OptionGroup):
    """Picture"""

    W: int | None = option(None, f"width in pixels, a multiple of {SIDE}; {DEFAULT_SIDE} when unset", at_least=SIDE)
    H: int | None = option(None, f"height in pixels, a multiple of {SIDE}; {DEFAULT_SIDE} when unset", at_least=SIDE)
    original_width: int | None = option(None, "the width that the model is told as the original's; the picture's when unset", at_least=0)  # fmt: skip
    original_height: int | None = option(None, "the height that the model is told as the original's; the picture's when unset", at_least=0)  # fmt: skip
    original_width_negative: int | None = option(None, "the same for the negative prompt; that of the prompt when unset", at_least=0)  # fmt: skip
    original_height_negative: int | None = option(None, "the same for the negative prompt; that of the prompt when unset", at_least=0)  # fmt: skip
    crop_top: int | None = option(None, "pixels that the model is told were cut off at the top; 0 when unset")
    crop_left: int | None = option(None, "pixels that the model is told were cut off at the left; 0 when unset")
    steps: int = option(50, "denoising steps", at_least=1, at_most=1000)
    sampler: str = option("ddim", "how noise becomes a picture", choices=tuple(SAMPLERS))
    scale: float = option(7.5, "guidance: strength of the prompt against the negative one; none at 1 and below")
    negative_scale: float | None = option(
        None, "guidance away from the negative prompt by a strength of its own, as seen from the empty prompt"
    )
    guidance_rescale: float = option(
        0.0, "share of the guided prediction that gets the spread of the unguided one back (0.7 is usual for zero terminal SNR)",
        at_least=0, at_most=1,
    )  # fmt: skip
    batch_size: int = option(
        1,
        "pictures drawn at once; those of other sizes or settings start a new batch",
        at_least=1,
        stored_in_image=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name, value in (("W", self.W), ("H", self.H)):
            if value is not None and (problem := side_problem(value)):
                yield Mistake(f"--{name} {value}: {problem}", (name,))


def side_problem(value: int) -> str | None:
    """What is wrong with a side in pixels."""
    if value >= SIDE and value % SIDE == 0:
        return None
    below, above = max(SIDE, value // SIDE * SIDE), max(SIDE, -(-value // SIDE) * SIDE)
    return f"must be a multiple of {SIDE}; take {below}" + (f" or {above}" if above != below else "")


@dataclass(frozen=True)
class InitImageOptions(OptionGroup):
    """Pictures that are drawn from"""

    image_path: Path | None = option(
        None, "picture, or folder of pictures, to start from; without prompts, those that are stored in them are drawn"
    )
    mask_path: Path | None = option(
        None, "mask, or folder of masks: white is repainted; with networks, where each of them works"
    )
    strength: float | None = option(
        None, "how much of --image_path is drawn anew; 0.8 when unset", at_least=0, at_most=1
    )
    guide_image_path: tuple[Path, ...] | None = option(
        None, "control pictures, or folders of them, taken in order: one for each control net of a picture"
    )
    clip_vision_strength: float | None = option(
        None, "the pooled text gives way to the CLIP image vector of --image_path, times this"
    )
    clip_vision_model: str = option(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "folder or hub id of the image encoder for --clip_vision_strength"
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name, value in (("image_path", self.image_path), ("mask_path", self.mask_path)):
            if value is not None and not value.exists():
                yield Mistake(f"--{name} {value}: no such file or folder", (name,))
        for path in self.guide_image_path or ():
            if not path.exists():
                yield Mistake(f"--guide_image_path {path}: no such file or folder", ("guide_image_path",))
        if self.clip_vision_strength is not None and self.image_path is None:
            yield Mistake("--clip_vision_strength needs --image_path: the picture that is looked at", ("image_path",))


@dataclass(frozen=True)
class HighresFixOptions(OptionGroup):
    """Highres fix: small first, then larger from that"""

    highres_fix_scale: float | None = option(None, "draw small first, at this share of the size, then go on at full size", above=0, at_most=1)  # fmt: skip
    highres_fix_steps: int = option(28, "steps of the small picture", at_least=1, at_most=1000)
    highres_fix_strength: float | None = option(None, "--strength of the small picture where it starts from --image_path; that of --strength when unset", at_least=0, at_most=1)  # fmt: skip
    highres_fix_save_1st: bool = option(False, "save the small pictures too", stored_in_image=False)
    highres_fix_latents_upscaling: bool = option(False, "enlarge latents instead of pixels")
    highres_fix_upscaler: str | None = option(None, "module with create_upscaler(**arguments), which enlarges instead")
    highres_fix_upscaler_args: str | None = option(None, "its arguments: key=value;key=value")
    highres_fix_disable_control_net: bool = option(False, "control nets are off in the second stage")

    def mistakes(self) -> Iterable[Mistake]:
        if self.highres_fix_upscaler_args is not None:
            if self.highres_fix_upscaler is None:
                yield Mistake("--highres_fix_upscaler_args needs --highres_fix_upscaler", ("highres_fix_upscaler",))
            for pair in self.highres_fix_upscaler_args.split(";"):
                if pair.count("=") != 1:
                    yield Mistake(
                        f"--highres_fix_upscaler_args: expected key=value, got {pair!r}", ("highres_fix_upscaler_args",)
                    )

    @property
    def upscaler_arguments(self) -> dict[str, str]:
        pairs = (pair.split("=") for pair in (self.highres_fix_upscaler_args or "").split(";") if pair)
        return {key.strip(): value.strip() for key, value in pairs}


@dataclass(frozen=True)
class DeepShrinkOptions(OptionGroup):
    """Deep Shrink: large pictures whose composition is drawn on a shrunk feature map"""

    ds_depth_1: int | None = option(None, "input block before which the feature map is shrunk; turns it on", at_least=0, at_most=8)  # fmt: skip
    ds_timesteps_1: int = option(650, "shrink there down to this timestep", at_least=0, at_most=1000)
    ds_depth_2: int | None = option(None, "a second such block, for the timesteps that follow", at_least=0, at_most=8)
    ds_timesteps_2: int = option(650, "shrink there down to this timestep", at_least=0, at_most=1000)
    ds_ratio: float = option(0.5, "factor by which sides are shrunk", above=0, at_most=1)


@dataclass(frozen=True)
class GradualLatentOptions(OptionGroup):
    """Gradual Latent: latents grow while they are drawn (euler_a)"""

    gradual_latent_timesteps: int | None = option(None, "latents start small and grow below this timestep; turns it on", at_least=0, at_most=1000)  # fmt: skip
    gradual_latent_ratio: float = option(0.5, "share of the sides that they start with", above=0, at_most=1)
    gradual_latent_ratio_step: float = option(0.125, "how much that share grows at once", above=0, at_most=1)
    gradual_latent_every_n_steps: int = option(3, "least steps from one growth to the next", at_least=1)
    gradual_latent_s_noise: float = option(1.0, "factor of the noise that is added where they grow", at_least=0)
    gradual_latent_unsharp_params: str | None = option(
        None,
        "sharpen what grows: size of the blur, its sigma, strength, and 1 (the next sample, usual) or 0 (this one): 3,0.5,0.5,1",
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.gradual_latent_unsharp_params is not None:
            try:
                read_unsharp(self.gradual_latent_unsharp_params)
            except ValueError as error:
                yield Mistake(f"--gradual_latent_unsharp_params: {error}", ("gradual_latent_unsharp_params",))


def read_unsharp(text: str) -> tuple[int, float, float, bool]:
    """ksize,sigma,strength[,target_x]. Raises ValueError with what was expected."""
    parts = text.split(",")
    try:
        size, sigma, strength, target = int(parts[0]), *map(float, parts[1:3]), int(parts[3]) if len(parts) > 3 else 1
        if len(parts) not in (3, 4) or size < 1 or size % 2 == 0 or sigma <= 0 or target not in (0, 1):
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(
            f"expected size,sigma,strength[,0 or 1] with an odd size, such as 3,0.5,0.5,1, got {text!r}"
        ) from None
    return size, sigma, strength, bool(target)


@dataclass(frozen=True)
class OutputOptions(OptionGroup, stored_in_image=False):
    """Files of pictures"""

    outdir: Path = option(Path("outputs"), "folder for the pictures; what lies there is never replaced")
    sequential_file_name: bool = option(False, "names im_000001.png and so on, behind those that are there")
    use_original_file_name: bool = option(
        False, "names of the pictures in --image_path; wins over --sequential_file_name"
    )
    image_format: str = option("png", "kind of the files; all of them keep what the picture was drawn with", choices=("png", "webp", "jpeg"))  # fmt: skip
    contact_sheet: bool = option(False, "save a sheet of all pictures too, a row for each prompt")
    dry_run: bool = option(False, "tell what would be drawn, read no weights, write nothing")

    def mistakes(self) -> Iterable[Mistake]:
        if self.outdir.exists() and not self.outdir.is_dir():
            yield Mistake(f"--outdir {self.outdir}: it is a file", ("outdir",))


GENERATION = (
    GenerationModelOptions, PromptOptions, ImageOptions, InitImageOptions, HighresFixOptions, DeepShrinkOptions,
    GradualLatentOptions, OutputOptions,
)  # fmt: skip
