"""Build: the network that the options ask for, over a U-Net and text encoders, its weights loaded."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from library.device import Precision
from library.log import log
from library.models.unet import UNet
from networks.base import Network
from networks.external import build_foreign
from networks.lora import LoraNetwork, text_encoder_targets, unet_targets
from networks.lora_file import TRAINING_REMEDY, copy_fitting, load_into, network_from_file, read_lora, read_tensors
from networks.options import NetworkOptions, read_network_args


def build_network(
    options: NetworkOptions, unet: UNet, encoders: Sequence[Any], device: torch.device, precision: Precision
) -> Network:
    """The network, attached.

    Args:
        encoders: those that it may cover; none if captions come encoded.
        device: where the models are; on "meta", neither has the network numbers.

    Raises OptionError if it can't be made, or --network_weights don't fit it.
    """
    if options.network_train_unet_only:
        encoders = ()
    # Without weights, neither does the network need numbers.
    with torch.device("meta") if device.type == "meta" else nullcontext():
        network = (_lora if options.is_own else _foreign)(options, unet, encoders, precision.compute)
    network.module.to(device, precision.trained)
    network.attach()
    if untrainable := network.untrainable():
        log.info(
            "%d modules can't be trained and are saved as they start: %s … (the first text encoder's last layer isn't used)",
            len(untrainable),
            untrainable[0],
        )
    return network


def _lora(options: NetworkOptions, unet: UNet, encoders: Sequence[Any], compute: torch.dtype) -> LoraNetwork:
    settings, _ = read_network_args(options)
    targets = [t for number, encoder in enumerate(encoders, 1) for t in text_encoder_targets(encoder, number)]
    if not options.network_train_text_encoder_only:
        targets += unet_targets(unet)
    tensors = None if options.network_weights is None else read_lora(options.network_weights, unet)
    if options.dim_from_weights and tensors is not None:
        # Ranks and alphas are the file's; learning-rate factors hold, dropouts don't (as in sd-scripts).
        settings = replace(settings, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
        network = network_from_file(targets, tensors, settings)
    else:
        network = LoraNetwork.from_settings(targets, settings)
    if tensors is not None:
        assert options.network_weights is not None
        load_into(network, tensors, source=options.network_weights, allow_partial=options.allow_partial)
    return network


def _foreign(options: NetworkOptions, unet: UNet, encoders: Sequence[Any], compute: torch.dtype) -> Network:
    tensors: Mapping[str, Tensor] | None = None
    if options.network_weights is not None:
        tensors = read_tensors(options.network_weights)
    network = build_foreign(options, unet, encoders, tensors, compute)
    if tensors is not None:
        assert options.network_weights is not None
        copy_fitting(
            tensors, network.file_tensors(), source=f"--network_weights {options.network_weights}", remedy=TRAINING_REMEDY,
            allow_partial=options.allow_partial,
        )  # fmt: skip
    return network
