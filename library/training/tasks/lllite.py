"""LLLiteTask: the modules of a ControlNet-LLLite are trained; the model stays as it is, and each picture comes with its condition."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.options import CacheOptions, CaptionOptions
from library.errors import OptionError
from library.log import log
from library.models.control import ControlInputs
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.models.unet import UNet
from library.options import Options
from library.param_group import ParamGroup
from library.training.options.optimizer import OptimizerOptions
from library.training.options.tasks import DEFAULT_DIM, DEFAULT_EMBEDDING, LLLiteOptions
from library.training.saving.metadata import RunFacts
from library.training.tasks.base import Task, cached_text
from library.training.trainable import Trainable, write_part
from networks.lllite import ControlNetLLLite, by_block, places, trained_places
from networks.lllite_file import read_lllite, shapes_in_file
from networks.lora_file import copy_fitting


class LLLitePart(Trainable):
    """The modules of one control net."""

    def __init__(self, net: ControlNetLLLite, lr: float, extension: str):
        self._net, self._lr, self._extension = net, lr, extension

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return dict(self._net.named_parameters())

    def groups(self) -> list[ParamGroup]:
        return [ParamGroup("lllite", dict(self._net.named_parameters()), self._lr)] if self._lr else []

    def after_step(self) -> None:
        pass

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.{self._extension}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = self.path(stem)
        write_part(path, {name: tensor.detach() for name, tensor in self.tensors().items()}, metadata, dtype)
        return path


class LLLiteTask(Task):
    """One control net. Differs from sd-scripts: dropout works whether or not there is gradient checkpointing."""

    tracker_name = "control_net_lllite"
    modelspec_kind = "/control-net-lllite"
    default_title = "ControlNet-LLLite"
    is_terse = True  # its files have modelspec alone

    def __init__(
        self,
        models: SdxlModels,
        options: LLLiteOptions,
        *,
        lr: float,
        num_tokens: int,
        text_is_cached: bool,
        weighted_captions: bool = False,
    ):
        """Args: text_is_cached: captions come encoded, and the text encoders aren't needed."""
        self._models, self._num_tokens, self._weighted = models, num_tokens, weighted_captions
        self._encoders = () if text_is_cached else models.text_encoders
        self.unet = models.unet
        self.compute_dtype = models.precision.compute
        self._net = build_lllite(options, self.unet, models.device, models.precision.trained)
        self.parts = [LLLitePart(self._net, lr, options.save_model_as)]

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "LLLiteTask":
        return cls(
            models,
            options[LLLiteOptions],
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            text_is_cached=options[CacheOptions].text,
            weighted_captions=options[CaptionOptions].weighted_captions,
        )

    def modules(self) -> list[nn.Module]:
        return [self._net, self.unet, *self._encoders]

    @torch.no_grad()
    def encode_text(self, batch: Batch) -> TextConditioning:
        if batch.text is not None:
            return cached_text(batch.text, self.compute_dtype)
        return TextConditioning.of(self._models.encode_texts(batch.captions, self._num_tokens, weighted=self._weighted))

    def control_inputs(self, conditions: Tensor) -> ControlInputs:
        return by_block(self._net(conditions.to(self.compute_dtype)))

    def metadata(self, options: Options, facts: RunFacts) -> dict[str, str]:
        return {}


def build_lllite(options: LLLiteOptions, unet: UNet, device: torch.device, dtype: torch.dtype) -> ControlNetLLLite:
    """The control net that the options ask for, its weights loaded. Raises OptionError if it can't be made, or the file doesn't fit.

    Where the options say neither places nor sizes, those of --network_weights hold.
    """
    tensors = (
        None if options.network_weights is None else read_lllite(options.network_weights, flag="--network_weights")
    )
    in_file = {} if tensors is None else shapes_in_file(tensors, places(unet))
    chosen = list(in_file) if in_file and options.lllite_blocks is None else trained_places(unet, options.lllite_blocks)
    if not chosen:
        there = ", ".join(dict.fromkeys(place.block for place in places(unet)))
        raise OptionError(f"--lllite_blocks {' '.join(options.lllite_blocks or ())}: this model's blocks with attention are {there}")  # fmt: skip
    shapes = {}
    for place in chosen:
        own = in_file.get(place, (DEFAULT_EMBEDDING, DEFAULT_DIM))
        shapes[place] = (options.cond_emb_dim or own[0], options.network_dim or own[1])
    with torch.device("meta") if device.type == "meta" else nullcontext():
        net = ControlNetLLLite(shapes, dropout=options.network_dropout or 0.0)
    if tensors is not None:
        remedy = "Give the options it was trained with, or --allow_partial to take what fits"
        copy_fitting(
            tensors, dict(net.named_parameters()), source=f"--network_weights {options.network_weights}", remedy=remedy, allow_partial=options.allow_partial
        )  # fmt: skip
    if device.type != "meta":
        channels = sorted(set(shapes.values()))
        log.info("ControlNet-LLLite: %d modules in %s, (embedding, network) channels %s", len(shapes), ", ".join(dict.fromkeys(place.block for place in chosen)), channels)  # fmt: skip
    return net.to(device, dtype)
