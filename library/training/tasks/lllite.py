"""LLLiteTask: trains a ControlNet-LLLite on the frozen model; each image comes with its conditioning image."""

from collections.abc import Iterable, Mapping
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
from networks.lllite import (
    AttentionProjection,
    ControlNetLLLite,
    attention_projections,
    to_control_inputs,
    trained_projections,
)
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
        return to_control_inputs(self._net(conditions.to(self.compute_dtype)))


def build_lllite(
    options: LLLiteOptions, unet: UNet, device: torch.device, dtype: torch.dtype
) -> ControlNetLLLite:
    """Build the control net that the options ask for, and load its weights.

    Where the options give neither blocks nor sizes, those of --network_weights are taken.

    Args:
        options: the options of ControlNet-LLLite.
        unet: the U-Net whose inputs it changes.
        device: the device of its parameters.
        dtype: the dtype of its parameters.

    Raises:
        OptionError: it can't be built, or the file doesn't fit.
    """
    tensors, file_shapes = None, {}
    if options.network_weights is not None:
        tensors = read_lllite(options.network_weights, flag="--network_weights")
        file_shapes = shapes_in_file(tensors, attention_projections(unet))
    targets = list(file_shapes)
    if options.lllite_blocks is not None or not targets:
        targets = trained_projections(unet, options.lllite_blocks)
    if not targets:
        words = " ".join(options.lllite_blocks or ())
        raise OptionError(
            f"--lllite_blocks {words}: this model's blocks with attention are {_blocks(attention_projections(unet))}"
        )
    shapes = {}
    for target in targets:
        embedding, dim = file_shapes.get(target, (DEFAULT_EMBEDDING, DEFAULT_DIM))
        shapes[target] = (options.cond_emb_dim or embedding, options.network_dim or dim)
    with torch.device("meta") if device.type == "meta" else nullcontext():
        net = ControlNetLLLite(shapes, dropout=options.network_dropout or 0.0)
    if tensors is not None:
        copy_fitting(
            tensors,
            dict(net.named_parameters()),
            source=f"--network_weights {options.network_weights}",
            remedy="Give the options it was trained with, or --allow_partial to take what fits",
            allow_partial=options.allow_partial,
        )
    if device.type != "meta":
        log.info(
            "ControlNet-LLLite: %d modules in %s, (embedding, network) channels %s",
            len(shapes),
            _blocks(targets),
            sorted(set(shapes.values())),
        )
    return net.to(device, dtype)


def _blocks(targets: Iterable[AttentionProjection]) -> str:
    """Return the names of the targets' blocks, once each."""
    return ", ".join(dict.fromkeys(target.block for target in targets))
