"""Saving an SDXL model: as a single file, or as a Diffusers folder.

Frozen tensors are copied from their checkpoint byte for byte; trained tensors are those of the live modules. In addition to the
model, one tensor at a time is in memory; for a .ckpt all of them. Contract: formats.md section 5.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.files import write_atomically
from library.models.checkpoint import layouts
from library.models.checkpoint.key_maps import FOLDERS, PARTS
from library.models.checkpoint.reader import Checkpoint
from library.models.tokenizer import Tokenizer, save_tokenizer
from library.models.unet_config import HEAD_CHANNELS, SIZE_CHANNELS, UNetConfig
from library.models.vae import LATENT_SCALE
from library.safetensors_io import write_safetensors

ModuleTensors = Mapping[str, Mapping[str, Tensor]]
"""part -> the tensors of its live module, under module names (key_maps.py)"""


def save_single_file(
    path: Path,
    checkpoint: Checkpoint,
    changed: ModuleTensors,
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
) -> None:
    """Write a single-file checkpoint.

    Args:
        checkpoint: where the parts that aren't in `changed` come from.
        dtype: of floating-point tensors; None keeps each tensor's own.
        v_prediction, zero_terminal_snr: marked by the keys v_pred and ztsnr, as other programs look for them.
    """
    made: dict[str, Callable[[], Tensor]] = {}
    for part in PARTS:
        for own in _file_tensors(part, checkpoint, changed):
            made |= {
                checkpoint.prefixes[part] + name: partial(own.__getitem__, name) for name in own
            }
    marks = {"v_pred": v_prediction, "ztsnr": zero_terminal_snr}
    made |= {name: partial(torch.zeros, 0) for name, is_set in marks.items() if is_set}
    tensors = layouts.LazyTensors(made)
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors, metadata, dtype_of=_dtype_chooser(dtype))
    else:
        stored = {  # in RAM: all are cast before the first is written, and a GPU may have no room for a second model
            name: tensor.to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors.items()
        }
        write_atomically(path, lambda file: torch.save({"state_dict": stored}, file))


def _file_tensors(
    part: str, checkpoint: Checkpoint, changed: ModuleTensors
) -> Iterator[Mapping[str, Tensor]]:
    """What a single file keeps of the part, later ones instead of earlier ones."""
    yield checkpoint.file_tensors(part)
    if part in changed:  # what the live module doesn't hold (logit_scale) stays what it was
        yield layouts.file_from_module(part, changed[part])


def _dtype_chooser(dtype: torch.dtype | None) -> Callable[[str, Tensor], str | None]:
    return lambda name, tensor: (
        str(dtype).removeprefix("torch.") if dtype and tensor.is_floating_point() else None
    )


# ----------------------------------------------------------------------------------------------------------- Diffusers


def save_diffusers(
    folder: Path,
    checkpoint: Checkpoint,
    changed: ModuleTensors,
    tokenizers: tuple[Tokenizer, Tokenizer],
    *,
    dtype: torch.dtype | None = None,
    v_prediction: bool = False,
    zero_terminal_snr: bool = False,
) -> None:
    """Write a StableDiffusionXLPipeline folder with safetensors weights."""
    tensors = {part: changed.get(part) or checkpoint.tensors(part) for part in checkpoint.parts}
    configs = dict(_configs(tensors, checkpoint.unet))
    for part in tensors:
        name = FOLDERS[part]
        (folder / name).mkdir(parents=True, exist_ok=True)
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        renamed = layouts.folder_from_module(part, tensors[part], checkpoint.unet)
        write_safetensors(
            folder / name / f"{stem}.safetensors",
            renamed,
            {"format": "pt"},
            dtype_of=_dtype_chooser(dtype),
        )
        _write_json(folder / name / "config.json", configs[part])
    index = _model_index(checkpoint.unet)
    for tokenizer, name in zip(tokenizers, ("tokenizer", "tokenizer_2"), strict=True):
        if index[name] != _ABSENT:
            save_tokenizer(tokenizer, folder / name)
    _write_json(
        folder / "scheduler" / "scheduler_config.json", _scheduler(v_prediction, zero_terminal_snr)
    )
    _write_json(folder / "model_index.json", index)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_MODEL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


_ABSENT = [None, None]


def _model_index(unet: UNetConfig) -> dict[str, Any]:
    """model_index.json of the pipeline that the model is for."""
    if unet.takes_score:
        return {
            **_MODEL_INDEX,
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "text_encoder": _ABSENT,
            "tokenizer": _ABSENT,
        }
    return (
        {**_MODEL_INDEX, "_class_name": "StableDiffusionXLInpaintPipeline"}
        if unet.is_inpainting
        else _MODEL_INDEX
    )


def _scheduler(v_prediction: bool, zero_terminal_snr: bool) -> dict[str, Any]:
    return {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        "rescale_betas_zero_snr": zero_terminal_snr,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def _configs(tensors: ModuleTensors, unet: UNetConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """config.json of each part."""
    from library.models.text_encoders import text_encoder_config
    from library.models.vae import vae_config

    yield "unet", unet_folder_config(unet)
    yield (
        "vae",
        {
            "_class_name": "AutoencoderKL",
            "scaling_factor": LATENT_SCALE,
            **vae_config(tensors["vae"]),
        },
    )
    for number, kind in ((1, "CLIPTextModel"), (2, "CLIPTextModelWithProjection")):
        if f"text_encoder_{number}" not in tensors:
            continue
        config = text_encoder_config(tensors[f"text_encoder_{number}"], number)
        yield (
            f"text_encoder_{number}",
            {"architectures": [kind], "model_type": "clip_text_model", **config},
        )


def unet_folder_config(unet: UNetConfig) -> dict[str, Any]:
    """Diffusers' configuration of a U-Net of these sizes."""
    layers = next(i for i, block in enumerate(unet.input_blocks) if block.resample)
    starts = range(0, len(unet.input_blocks), layers + 1)
    down = [unet.input_blocks[i] for i in starts]
    widths = [block.channels_out for block in down]
    up_depths = [
        [block.depth for block in unet.output_blocks[i : i + layers + 1]]
        for i in range(0, len(unet.output_blocks), layers + 1)
    ]
    regular = all(
        depth == down[-1 - i].depth for i, depths in enumerate(up_depths) for depth in depths
    )
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": [
            "CrossAttnDownBlock2D" if block.depth else "DownBlock2D" for block in down
        ],
        "mid_block_type": "UNetMidBlock2D"
        if unet.middle_depth is None
        else "UNetMidBlock2DCrossAttn",
        "up_block_types": [
            "CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in up_depths
        ],
        "transformer_layers_per_block": [max(1, block.depth) for block in down],
        "attention_head_dim": [max(1, width // HEAD_CHANNELS) for width in widths],
        "cross_attention_dim": unet.context_channels,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_CHANNELS,
        "projection_class_embeddings_input_dim": unet.vector_channels,
    }
    if not regular:  # SSD-1B and Vega
        config["reverse_transformer_layers_per_block"] = [
            depths if any(depths) else 1 for depths in up_depths
        ]
    return config
