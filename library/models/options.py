"""Options of the base model and how it is loaded. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """Model."""

    pretrained_model_name_or_path: str | None = option(
        None,
        "base model: a .safetensors or .ckpt file, a Diffusers folder, or a hub id",
        affects_result=False,
        private=True,
    )
    vae: str | None = option(
        None,
        "another VAE: a VAE file or a complete checkpoint, a Diffusers folder, or a hub id",
        affects_result=False,
        private=True,
    )
    tokenizer_cache_dir: Path | None = option(
        None,
        "folder in which the two tokenizers are cached; unset: the model folder's, or those that "
        "come with this program",
        affects_result=False,
        private=True,
    )
    max_token_length: int | None = option(
        None,
        "tokens per caption: 75 when unset, or 150 or 225; longer captions are truncated",
        choices=(150, 225),
        unset=(75, "75"),
    )
    v_parameterization: bool = option(
        False,
        "the model predicts velocity (v) instead of noise; detected where the checkpoint says so",
    )
    zero_terminal_snr: bool = option(
        False,
        "train with a noise schedule whose last timestep is pure noise; meant for velocity "
        "prediction",
    )
    no_half_vae: bool = option(
        False, "run the VAE in float32; without it, a VAE that overflows is retried in float32"
    )
    sdpa: bool = option(False, "PyTorch's attention in the U-Net, which is the default anyway")
    xformers: bool = option(
        False, "xformers' attention in the U-Net, if xformers is installed; else PyTorch's"
    )
    mem_eff_attn: bool = option(
        False,
        "attention in chunks in the U-Net, for GPUs without a memory-efficient attention kernel",
    )
    disable_mmap_load_safetensors: bool = option(
        False, "read safetensors files into memory instead of mapping them"
    )
    verify_model: bool = option(
        False,
        "compare the base model's tensors with the sha256 in its metadata, to notice a damaged file",
    )
    v2: bool = option(False, "an SD 2.x model, which is refused")
    clip_skip: int | None = option(
        None,
        "stored in the metadata",
        no_effect="SDXL always takes the last layer but one; the number is only stored in the "
        "metadata",
        at_least=1,
    )
    lowram: bool = option(
        False,
        "load directly to the GPU",
        no_effect="models are always loaded directly to the device that runs them, one tensor at "
        "a time",
    )
    highvram: bool = option(
        False,
        "keep the CUDA memory cache while caching",
        no_effect="the CUDA memory cache is never emptied between batches",
    )

    @property
    def num_tokens(self) -> int:
        """Tokens per caption, without start and end tokens."""
        return self.max_token_length or 75

    def mistakes(self) -> Iterable[Mistake]:
        if self.pretrained_model_name_or_path is None:
            yield Mistake(
                "--pretrained_model_name_or_path is missing: the SDXL model to start from",
                ("pretrained_model_name_or_path",),
            )
        if self.v2:
            yield Mistake(
                "--v2: SD 2.x models can't be trained here; leave it out for SDXL", ("v2",)
            )
