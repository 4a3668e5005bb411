"""The two CLIP text encoders: token ids in, TextConditioning out.

Shapes: B batch, n chunks of 75 tokens, T = 75 n + 2 tokens.
Encoder 1 (CLIP ViT-L, width 768) gives the input of its last layer; encoder 2 (OpenCLIP bigG, 1280) the input of its last
layer and, pooled at the first end-of-text token of the first chunk, a vector. Neither hidden state passes a final norm.

The refiner has encoder 2 alone: hidden_1 has width 0 there.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.1; contract: training_math.md section 4.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from library.imports import import_transformers

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

END_OF_TEXT = 49407
_CLIP_HEAD_CHANNELS = 64


class EncodedText(NamedTuple):
    """What the encoders give, and text caches keep: hidden_1 [B, T, 768], hidden_2 [B, T, 1280], pooled [B, 1280]."""

    hidden_1: Tensor
    hidden_2: Tensor
    pooled: Tensor


class TextConditioning(NamedTuple):
    """What the U-Net wants of the text: context [B, T, 2048], pooled [B, 1280]."""

    context: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, text: EncodedText) -> "TextConditioning":
        return cls(torch.cat([text.hidden_1, text.hidden_2], dim=-1), text.pooled)


class NullTextEncoder(nn.Module):
    """The first text encoder of a model that has none (the refiner): no layers, no parameters, states of width 0."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList()


def build_text_encoder(tensors: Mapping[str, Tensor], number: int) -> nn.Module:
    """Text encoder 1 or 2 of the sizes that `tensors` (module names) show, without weights, on the meta device."""
    transformers = import_transformers()
    kind = transformers.CLIPTextModel if number == 1 else transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        return kind(transformers.CLIPTextConfig(**text_encoder_config(tensors, number)))


def text_encoder_skeleton(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The layers and parameters of a text encoder (module names) on the meta device: all that a network or an optimizer asks for.

    It can't encode, and needs no transformers, whose import takes longer than all else that a dry run does.
    """
    encoder = nn.Module()
    with torch.device("meta"):
        for name, tensor in tensors.items():
            module = encoder
            *path, parameter = name.split(".")
            for depth, step in enumerate(path, 1):
                if step not in module._modules:
                    module.add_module(step, _layer(".".join(path[:depth]), tensors))
                module = module.get_submodule(step)
            module.register_parameter(
                parameter, nn.Parameter(torch.empty(tensor.shape), requires_grad=False)
            )
    return encoder


def _layer(path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A linear layer by its matrix and bias, a list by its name, or a module that only holds others."""
    weight = tensors.get(f"{path}.weight")
    if weight is not None and weight.ndim == 2 and f"{path}.bias" in tensors:
        return nn.Linear(weight.shape[1], weight.shape[0])
    return nn.ModuleList() if path.endswith(".layers") else nn.Module()


def text_encoder_config(tensors: Mapping[str, Tensor], number: int) -> dict[str, Any]:
    """Transformers' configuration of text encoder 1 or 2, by the shapes of its tensors (module names)."""
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 1
        + max(
            int(name.split(".")[3])
            for name in tensors
            if name.startswith("text_model.encoder.layers.")
        ),
        "num_attention_heads": width // _CLIP_HEAD_CHANNELS,
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[
            0
        ],
        "projection_dim": tensors["text_projection.weight"].shape[0] if number == 2 else width,
        "hidden_act": "quick_gelu" if number == 1 else "gelu",
        "bos_token_id": END_OF_TEXT - 1,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT if number == 1 else 0,
    }


def module_name(encoder: nn.Module, name: str) -> str:
    """The name (key_maps.py) of what this version of transformers calls `name` within `encoder`.

    transformers 5 dropped `text_model.` from CLIPTextModel, and kept it in CLIPTextModelWithProjection; files and network
    modules have it for both.
    """
    return f"text_model.{name}" if clip_body(encoder) is encoder else name


def encode(
    ids_1: Tensor,
    ids_2: Tensor,
    encoder_1: "CLIPTextModel",
    encoder_2: "CLIPTextModelWithProjection",
    *,
    keep_markers: bool = False,
) -> EncodedText:
    """Encode token ids, [B, n, 77] each, on the encoders' device; in the encoders' dtype, differentiable.

    Args:
        encoder_1: may be an AbsentEncoder.
        keep_markers: T = 77 n: each chunk keeps its begin and end marker, as when images are drawn from prompts.
    """
    chunks = ids_1.shape[1]
    states_2, last = _run(clip_body(encoder_2), ids_2.flatten(0, 1))
    is_absent = isinstance(encoder_1, NullTextEncoder)
    states_1 = (
        states_2[..., :0] if is_absent else _run(clip_body(encoder_1), ids_1.flatten(0, 1))[0]
    )
    last = last.unflatten(0, (-1, chunks))[:, 0]  # [B, 77, 1280]: the first chunk's
    first_end = (ids_2[:, 0] == END_OF_TEXT).int().argmax(dim=-1)  # 0 if there is none
    pooled = encoder_2.text_projection(last[torch.arange(len(last), device=last.device), first_end])
    join = _join_chunks if keep_markers else _merge_chunks
    return EncodedText(join(states_1, chunks), join(states_2, chunks), pooled)


def clip_body(encoder: Any) -> Any:
    """The module that holds embeddings, layers and final norm, which versions of transformers keep in different places."""
    return getattr(encoder, "text_model", encoder)


def _run(body: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of the last layer and the output of the final norm, [B * n, 77, C] each."""
    seen: list[Tensor] = []
    hook = body.encoder.layers[-1].register_forward_pre_hook(
        lambda layer, inputs: seen.append(inputs[0])
    )
    try:
        last = body(ids).last_hidden_state
    finally:
        hook.remove()
    return seen[0], last


def _merge_chunks(states: Tensor, chunks: int) -> Tensor:
    """[B * n, 77, C] -> [B, 75 n + 2, C]: the first chunk's begin marker, all inner tokens, the last chunk's end."""
    states = states.unflatten(0, (-1, chunks))
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def _join_chunks(states: Tensor, chunks: int) -> Tensor:
    """[B * n, 77, C] -> [B, 77 n, C]."""
    return states.unflatten(0, (-1, chunks)).flatten(1, 2)


def weigh(text: EncodedText, weights_1: Tensor, weights_2: Tensor) -> EncodedText:
    """Multiply each token's states by its weight, [B, T]; the pooled vector stays (contract: weighted captions)."""
    return text._replace(hidden_1=text.hidden_1 * weights_1[..., None].to(text.hidden_1.dtype),
                         hidden_2=text.hidden_2 * weights_2[..., None].to(text.hidden_2.dtype))  # fmt: skip
