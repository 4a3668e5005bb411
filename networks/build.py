"""Building the network that the options ask for, of any kind."""

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from library.device import Precision
from library.log import log
from library.models.unet import UNet
from networks.base import Network
from networks.options import NetworkOptions


def build_network(
    options: NetworkOptions,
    unet: UNet,
    encoders: Sequence[Any],
    device: torch.device,
    precision: Precision,
) -> Network:
    """Build the network for the options and attach it to the models.

    Args:
        options: the options of the network.
        unet: the U-Net.
        encoders: the text encoders that it may cover; empty if captions are encoded in advance.
        device: the device of the models. On "meta" the network has no data either.
        precision: its dtypes.

    Raises:
        OptionError: if it can't be built, or --network_weights don't fit.
    """
    if options.network_train_unet_only:
        encoders = ()
    build = importlib.import_module(options.kind.module).build
    with torch.device("meta") if device.type == "meta" else nullcontext():
        network: Network = build(options, unet, encoders, precision.compute)
    network.module.to(device, precision.trained)
    network.attach()
    if untrainable := network.untrainable():
        log.info(
            "%d modules can't be trained and are saved with their initial weights: %s … (SDXL "
            "doesn't use the output of the first text encoder's last layer)",
            len(untrainable),
            untrainable[0],
        )
    return network
