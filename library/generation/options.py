"""Options of sdxl_gen_img.py, except those of networks. This module doesn't import torch.

Names and meanings: contract, options.tsv. docs/differences.md lists the options that sd-scripts
doesn't have.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.generation.deep_shrink import DeepShrinkOptions
from library.generation.gradual_latent import GradualLatentOptions
from library.generation.samplers import SAMPLERS
from library.options import OptionGroup, option

SIDE = 32  # sides in pixels are multiples: latents are an eighth of the image, halved twice
DEFAULT_SIDE = 1024
MAX_SEED = 2**63 - 2  # torch's largest seed, less one for the second stage of highres fix


@dataclass(frozen=True)
class GenerationModelOptions(OptionGroup):
    """Model to generate with."""

    ckpt: str | None = option(
        None,
        "model: a .safetensors or .ckpt file, a Diffusers folder, a hub id, or a pattern (*) that "
        "matches one file",
    )
    vae: str | None = option(
        None, "another VAE: a VAE file or complete checkpoint, a Diffusers folder, or a hub id"
    )
    tokenizer_cache_dir: Path | None = option(
        None,
        "folder in which the two tokenizers are cached; unset: the model folder's, or those that "
        "come with this program",
    )
    fp16: bool = option(False, "generate in float16")
    bf16: bool = option(False, "generate in bfloat16; --fp16 wins")
    no_half_vae: bool = option(
        False,
        "run the VAE in float32; without it, only an image that is black or has NaN is decoded "
        "again in float32",
    )
    v_parameterization: bool = option(
        False, "the model predicts velocity; read from the checkpoint where it says so"
    )
    zero_terminal_snr: bool = option(
        False, "the model's last timestep is pure noise; read from the checkpoint where it says so"
    )
    sdpa: bool = option(False, "PyTorch's attention, which is the default")
    xformers: bool = option(
        False, "xformers' attention in the U-Net, if xformers is installed; else PyTorch's"
    )
    diffusers_xformers: bool = option(
        False,
        "xformers by Diffusers",
        no_effect="the U-Net isn't Diffusers'; use --xformers for xformers",
    )
    opt_channels_last: bool = option(
        False, "channels-last memory format", no_effect="convolutions always use channels_last"
    )
    compile: bool = option(
        False,
        "compile the U-Net's blocks: the first image of a size takes minutes, later ones are faster",
    )
    vae_batch_size: float | None = option(
        None,
        "images that the VAE decodes at once; a value below 1 is a fraction of the batch; "
        "unset: the complete batch",
        above=0,
    )
    vae_slices: int | None = option(
        None,
        "run the VAE's convolutions on the image in N slices: less VRAM, the same image",
        at_least=1,
    )
    vae_tiling: bool = option(
        False,
        "decode overlapping tiles of 512 pixels: the least VRAM, a slightly different image",
    )

    @property
    def mixed_precision(self) -> str:
        if self.fp16:
            return "fp16"
        return "bf16" if self.bf16 else "no"

    def mistakes(self) -> Iterable[Mistake]:
        if self.ckpt is None:
            yield Mistake("--ckpt is missing: the SDXL model to generate with", ("ckpt",))
        if self.vae_batch_size is not None and self.vae_batch_size >= 1 and self.vae_batch_size % 1:
            yield Mistake(
                f"--vae_batch_size {self.vae_batch_size:g}: expected a whole number of images, "
                "or a fraction below 1",
                ("vae_batch_size",),
            )
        if self.vae_slices is not None and self.vae_tiling:
            yield Mistake(
                "--vae_slices and --vae_tiling can't be combined; use one of them",
                ("vae_slices", "vae_tiling"),
            )


@dataclass(frozen=True)
class PromptOptions(OptionGroup):
    """Prompts and seeds."""

    prompt: str | None = option(
        None,
        "prompt; may contain options such as --w 832 (docs/generate.md)",
        stored_in_image=False,
    )
    prompt2: str | None = option(
        None, "prompt of the second text encoder, if it differs; --p2 within a prompt wins"
    )
    from_file: Path | None = option(
        None,
        "text file with one prompt per line; blank lines and # lines are skipped; "
        "--prompt is ignored",
        stored_in_image=False,
    )
    from_png: Path | None = option(
        None,
        "generate the image of this file again: use the options that it stores; "
        "options on the command line win",
        stored_in_image=False,
    )
    interactive: bool = option(
        False,
        "ask for prompts, one per line, until the end of input; --n_iter is 1",
        stored_in_image=False,
    )
    no_preview: bool = option(
        False,
        "no preview window in --interactive",
        no_effect="no window is ever opened; the name of each file is logged",
        stored_in_image=False,
    )
    images_per_prompt: int = option(
        1, "images to generate per prompt", at_least=1, stored_in_image=False
    )
    n_iter: int = option(
        1, "times that the complete list of prompts is generated", at_least=1, stored_in_image=False
    )
    seed: int | None = option(
        None,
        "seed of the images' seeds; a single image uses it directly; random when unset",
        at_least=0,
        at_most=MAX_SEED,
        stored_in_image=False,
    )
    iter_same_seed: bool = option(
        False,
        "use the same seeds for all prompts of an iteration (--n_iter)",
        stored_in_image=False,
    )
    clip_skip: int | None = option(
        None,
        "text encoder layers to skip",
        no_effect="SDXL always uses the last layer but one",
        at_least=1,
    )
    max_embeddings_multiples: int | None = option(
        None,
        "maximum length of a prompt in units of 75 tokens; longer prompts are truncated with a "
        "warning; unset: no limit",
        at_least=1,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.from_file is not None and not self.from_file.is_file():
            yield Mistake(f"--from_file {self.from_file}: no such file", ("from_file",))
        if self.interactive and self.from_file is not None:
            yield Mistake(
                "--interactive and --from_file can't be combined; use one of them",
                ("interactive", "from_file"),
            )


@dataclass(frozen=True)
class ImageOptions(OptionGroup):
    """Image size, steps, sampler and guidance."""

    W: int | None = option(
        None,
        f"width in pixels, a multiple of {SIDE}; {DEFAULT_SIDE} when unset",
        at_least=SIDE,
    )
    H: int | None = option(
        None,
        f"height in pixels, a multiple of {SIDE}; {DEFAULT_SIDE} when unset",
        at_least=SIDE,
    )
    original_width: int | None = option(
        None, "size conditioning: width of the original; the image's width when unset", at_least=0
    )
    original_height: int | None = option(
        None, "size conditioning: height of the original; the image's height when unset", at_least=0
    )
    original_width_negative: int | None = option(
        None, "--original_width for the negative prompt; the same when unset", at_least=0
    )
    original_height_negative: int | None = option(
        None, "--original_height for the negative prompt; the same when unset", at_least=0
    )
    crop_top: int | None = option(
        None, "size conditioning: pixels cropped from the top of the original; 0 when unset"
    )
    crop_left: int | None = option(
        None, "size conditioning: pixels cropped from the left of the original; 0 when unset"
    )
    steps: int = option(50, "denoising steps", at_least=1, at_most=1000)
    sampler: str = option("ddim", "sampler (noise scheduler)", choices=tuple(SAMPLERS))
    scale: float = option(
        7.5, "classifier-free guidance scale (CFG); guidance is off at 1 and below"
    )
    negative_scale: float | None = option(
        None,
        "guidance scale of the negative prompt, if both prompts are guided relative to the "
        "empty prompt",
    )
    guidance_rescale: float = option(
        0.0,
        "set this fraction of the guided prediction's standard deviation back to that of the "
        "unguided one (0.7 is usual for zero terminal SNR)",
        at_least=0,
        at_most=1,
    )
    batch_size: int = option(
        1,
        "images generated at once; images of other sizes or settings start a new batch",
        at_least=1,
        stored_in_image=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name, value in (("W", self.W), ("H", self.H)):
            problem = None if value is None else side_problem(value)
            if problem:
                yield Mistake(f"--{name} {value}: {problem}", (name,))


def side_problem(value: int) -> str | None:
    """Return why a side in pixels is invalid; None if it is valid."""
    if value >= SIDE and value % SIDE == 0:
        return None
    below = max(SIDE, value // SIDE * SIDE)
    above = max(SIDE, -(-value // SIDE) * SIDE)
    if above == below:
        return f"must be a multiple of {SIDE}; use {below}"
    return f"must be a multiple of {SIDE}; use {below} or {above}"


@dataclass(frozen=True)
class InitImageOptions(OptionGroup):
    """img2img, inpainting and guide images."""

    image_path: Path | None = option(
        None,
        "init image (img2img), or a folder of them; without prompts, the prompts stored in the "
        "images are used",
    )
    mask_path: Path | None = option(
        None,
        "inpainting mask, or a folder of them: white is repainted; with networks: the region of "
        "each network",
    )
    strength: float | None = option(
        None,
        "share of the steps that run on --image_path: 0 keeps the image, 1 replaces it; "
        "0.8 when unset",
        at_least=0,
        at_most=1,
    )
    guide_image_path: tuple[Path, ...] | None = option(
        None,
        "guide images of control nets, or folders of them, used in order: one per control net "
        "and image",
    )
    clip_vision_strength: float | None = option(
        None,
        "replace the pooled text embedding by the CLIP embedding of --image_path times this factor",
    )
    clip_vision_model: str = option(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "folder or hub id of the image encoder for --clip_vision_strength",
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name, value in (("image_path", self.image_path), ("mask_path", self.mask_path)):
            if value is not None and not value.exists():
                yield Mistake(f"--{name} {value}: no such file or folder", (name,))
        for path in self.guide_image_path or ():
            if not path.exists():
                yield Mistake(
                    f"--guide_image_path {path}: no such file or folder", ("guide_image_path",)
                )
        if self.clip_vision_strength is not None and self.image_path is None:
            yield Mistake(
                "--clip_vision_strength needs --image_path: the image to embed", ("image_path",)
            )


@dataclass(frozen=True)
class HighresFixOptions(OptionGroup):
    """Highres fix: generate a small image first, then enlarge and refine it."""

    highres_fix_scale: float | None = option(
        None,
        "size of the first stage as a fraction of the image's sides; turns highres fix on",
        above=0,
        at_most=1,
    )
    highres_fix_steps: int = option(28, "steps of the first stage", at_least=1, at_most=1000)
    highres_fix_strength: float | None = option(
        None,
        "--strength of the first stage with --image_path; that of --strength when unset",
        at_least=0,
        at_most=1,
    )
    highres_fix_save_1st: bool = option(
        False, "save the images of the first stage too", stored_in_image=False
    )
    highres_fix_latents_upscaling: bool = option(False, "enlarge latents instead of pixels")
    highres_fix_upscaler: str | None = option(
        None, "module with create_upscaler(**arguments) that enlarges the image"
    )
    highres_fix_upscaler_args: str | None = option(
        None, "arguments of --highres_fix_upscaler: key=value;key=value"
    )
    highres_fix_disable_control_net: bool = option(
        False, "turn control nets off in the second stage"
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.highres_fix_upscaler_args is not None:
            if self.highres_fix_upscaler is None:
                yield Mistake(
                    "--highres_fix_upscaler_args needs --highres_fix_upscaler",
                    ("highres_fix_upscaler",),
                )
            for pair in self.highres_fix_upscaler_args.split(";"):
                if pair.count("=") != 1:
                    yield Mistake(
                        f"--highres_fix_upscaler_args: expected key=value, got {pair!r}",
                        ("highres_fix_upscaler_args",),
                    )

    @property
    def upscaler_arguments(self) -> dict[str, str]:
        arguments = {}
        for pair in (self.highres_fix_upscaler_args or "").split(";"):
            if pair:
                key, value = pair.split("=")
                arguments[key.strip()] = value.strip()
        return arguments


@dataclass(frozen=True)
class OutputOptions(OptionGroup, stored_in_image=False):
    """Image files."""

    outdir: Path = option(
        Path("outputs"), "folder for the images; existing files are never replaced"
    )
    sequential_file_name: bool = option(
        False, "name files im_000001.png and so on, after the existing ones"
    )
    use_original_file_name: bool = option(
        False, "name files like the images of --image_path; wins over --sequential_file_name"
    )
    image_format: str = option(
        "png",
        "file format; all of them store the settings of the image",
        choices=("png", "webp", "jpeg"),
    )
    contact_sheet: bool = option(
        False, "also save a contact sheet of all images, with a row per prompt"
    )
    dry_run: bool = option(
        False, "list the images that would be generated; read no weights, write nothing"
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.outdir.exists() and not self.outdir.is_dir():
            yield Mistake(f"--outdir {self.outdir}: this is a file, not a folder", ("outdir",))


GENERATION = (
    GenerationModelOptions,
    PromptOptions,
    ImageOptions,
    InitImageOptions,
    HighresFixOptions,
    DeepShrinkOptions,
    GradualLatentOptions,
    OutputOptions,
)
