"""LLLiteTask: trains a ControlNet-LLLite on the frozen model; each image comes with its conditioning image."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from library.errors import OptionError
from library.log import log
from library.models.control import ControlInputs
from library.models.sdxl import SdxlModels
from library.models.unet import UNet
from library.param_group import ParamGroup
from library.training.options.tasks import DEFAULT_DIM, DEFAULT_EMBEDDING, LLLiteOptions
from library.training.tasks.base import Task, TaskSettings
from library.training.trainable import Trainable
from networks.lllite import ControlNetLLLite, by_block, places, trained_places
from networks.lllite_file import read_lllite, shapes_in_file
from networks.lora_file import copy_fitting


class TrainableLLLite(Trainable):
    """The modules of one ControlNet-LLLite."""

    def __init__(self, net: ControlNetLLLite, lr: float, extension: str):
        self._parameters = dict(net.named_parameters())
        super().__init__([ParamGroup("lllite", self._parameters, lr)] if lr else [], extension)

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._parameters


class LLLiteTask(Task[tuple[LLLiteOptions]]):
    """Trains one ControlNet-LLLite.

    Differs from sd-scripts: dropout works with and without gradient checkpointing.
    """

    option_groups = (LLLiteOptions,)
    conditioning_kind = "conditions"
    tracker_name = "control_net_lllite"
    modelspec_kind = "/control-net-lllite"
    default_title = "ControlNet-LLLite"

    def __init__(self, models: SdxlModels, settings: TaskSettings, groups: tuple[LLLiteOptions]):
        super().__init__(models, settings, groups)
        (options,) = groups
        self._net = build_lllite(options, self.unet, models.device, models.precision.trained)
        self.trainables = [TrainableLLLite(self._net, settings.lr, options.save_model_as)]

    def modules(self) -> list[nn.Module]:
        return [self._net, self.unet, *self._encoders]

    def control_inputs(self, conditions: Tensor) -> ControlInputs:
        return by_block(self._net(conditions.to(self.compute_dtype)))


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
