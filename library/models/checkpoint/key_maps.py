"""Names of the same tensor in single-file checkpoints, Diffusers folders and live modules, as data. No tensors here.

A live module's names ("module names" below): the U-Net's are the single file's; the text encoders' are transformers' with
`text_model.` in front, whatever the installed version makes of it; the VAE's are Diffusers'.
"""

import re
from collections.abc import Iterable, Sequence

from library.models.unet_config import UNetConfig

PARTS = ("unet", "text_encoder_1", "text_encoder_2", "vae")

FILE_PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder_1": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}

# The refiner has the second text encoder alone, in the first one's place.
REFINER_PREFIXES = {**FILE_PREFIXES, "text_encoder_2": "conditioner.embedders.0.model."}

FOLDERS = {
    "unet": "unet",
    "text_encoder_1": "text_encoder",
    "text_encoder_2": "text_encoder_2",
    "vae": "vae",
}

# Keys that older versions of the libraries wrote and that carry no weights.
DROPPED = ("position_ids", "text_projection.weight.weight")

Pairs = Sequence[tuple[str, str]]
"""(name, other name) of module prefixes; each ends where a `.` or the end of the name follows."""


class Renaming:
    """Renames by prefix, the longest first; a name that no prefix fits stays as it is."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self._by_prefix = dict(pairs)

    def __call__(self, name: str) -> str:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in self._by_prefix:
                return ".".join([self._by_prefix[prefix], *parts[length:]])
        return name


def inverse(pairs: Pairs) -> Pairs:
    return [(b, a) for a, b in pairs]


# --------------------------------------------------------------------------------------------------------------- U-Net

_RESIDUAL = (
    ("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut"),
)  # fmt: skip

_UNET_ENDS = (
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"),
)  # fmt: skip


def unet_pairs(levels: int, layers: int, attended_up: set[int]) -> Pairs:
    """(single-file, Diffusers) prefixes of a U-Net.

    Args:
        levels: resolutions (3 in SDXL base).
        layers: residual blocks of a level on the way down (2); one more on the way up.
        attended_up: the levels on the way up, 0 the deepest, whose blocks have transformers.
    """
    pairs = list(_UNET_ENDS)

    def block(single: str, diffusers: str, i: int) -> None:
        pairs.extend((f"{single}.0.{a}", f"{diffusers}.resnets.{i}.{b}") for a, b in _RESIDUAL)
        pairs.append((f"{single}.1", f"{diffusers}.attentions.{i}"))

    for level in range(levels):
        first = (layers + 1) * level
        for i in range(layers):
            block(f"input_blocks.{first + i + 1}", f"down_blocks.{level}", i)
        pairs.append(
            (f"input_blocks.{first + layers + 1}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
        )
        for i in range(layers + 1):
            block(f"output_blocks.{first + i}", f"up_blocks.{level}", i)
        up = 2 if level in attended_up else 1
        pairs.append(
            (f"output_blocks.{first + layers}.{up}.conv", f"up_blocks.{level}.upsamplers.0.conv")
        )
    block("middle_block", "mid_block", 0)
    pairs.extend((f"middle_block.2.{a}", f"mid_block.resnets.1.{b}") for a, b in _RESIDUAL)
    return pairs


def unet_pairs_of_config(config: UNetConfig) -> Pairs:
    layers = next(i for i, block in enumerate(config.input_blocks) if block.resample)
    levels = 1 + sum(block.resample for block in config.input_blocks)
    attended = {
        level
        for level in range(levels)
        if config.output_blocks[(layers + 1) * level + layers].depth
    }
    return unet_pairs(levels, layers, attended)


def unet_pairs_of_diffusers_names(names: Iterable[str]) -> Pairs:
    names = list(names)
    downs = [
        tuple(map(int, match.groups()))
        for name in names
        if (match := re.match(r"down_blocks\.(\d+)\.resnets\.(\d+)\.", name))
    ]
    attended = {
        int(match[1])
        for name in names
        if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))
    }
    levels, layers = (1 + max((pair[k] for pair in downs), default=0) for k in (0, 1))
    return unet_pairs(levels, layers, attended)


# ----------------------------------------------------------------------------------------------------------------- VAE


def vae_pairs(levels: int = 4) -> Pairs:
    """(single-file, Diffusers) prefixes of the VAE."""
    pairs = [
        ("encoder.norm_out", "encoder.conv_norm_out"),
        ("decoder.norm_out", "decoder.conv_norm_out"),
    ]
    for level in range(levels):
        up = (
            levels - 1 - level
        )  # the single file numbers the decoder's levels by resolution, Diffusers by order
        for i in range(3):
            pairs.append(
                (f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}")
            )
            pairs.append((f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}"))
            pairs.append(
                (
                    f"encoder.down.{level}.block.{i}.nin_shortcut",
                    f"encoder.down_blocks.{level}.resnets.{i}.conv_shortcut",
                )
            )
            pairs.append(
                (
                    f"decoder.up.{level}.block.{i}.nin_shortcut",
                    f"decoder.up_blocks.{up}.resnets.{i}.conv_shortcut",
                )
            )
        pairs.append(
            (
                f"encoder.down.{level}.downsample.conv",
                f"encoder.down_blocks.{level}.downsamplers.0.conv",
            )
        )
        pairs.append(
            (f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv")
        )
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid_block"
        pairs += [
            (f"{side}.mid.block_1", f"{mid}.resnets.0"),
            (f"{side}.mid.block_2", f"{mid}.resnets.1"),
        ]
        attention = (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        )
        pairs += [(f"{side}.mid.attn_1.{a}", f"{mid}.attentions.0.{b}") for a, b in attention]
    return pairs


# Names of the VAE's attention in Diffusers folders written before 2023.
OLD_VAE_ATTENTION = [
    (f"{side}.mid_block.attentions.0.{old}", f"{side}.mid_block.attentions.0.{new}")
    for side in ("encoder", "decoder")
    for old, new in (
        ("query", "to_q"),
        ("key", "to_k"),
        ("value", "to_v"),
        ("proj_attn", "to_out.0"),
    )
]

# Linear layers of the VAE's attention; single files keep them as 1x1 convolutions.
VAE_ATTENTION_WEIGHT = re.compile(
    r"(encoder|decoder)\.mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0)\.weight"
)

# -------------------------------------------------------------------------------------------------------- text encoder 2

_OPEN_CLIP_ENDS = (
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),  # stored for x @ P; a Linear holds P transposed
)
_OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)  # fmt: skip

# The three projections that open_clip stacks as attn.in_proj_weight and attn.in_proj_bias, in this order.
STACKED = ("q_proj", "k_proj", "v_proj")


def open_clip_pairs(layers: int) -> Pairs:
    """(single-file, transformers) prefixes of text encoder 2, without the stacked projections."""
    return list(_OPEN_CLIP_ENDS) + [
        (f"transformer.resblocks.{i}.{a}", f"text_model.encoder.layers.{i}.{b}")
        for i in range(layers)
        for a, b in _OPEN_CLIP_LAYER
    ]
