"""The kinds of networks that --network_module can name. This module doesn't import torch.

To add a kind, for example networks.loha:
1. Write networks/loha.py: a class derived from `Network` (networks/base.py), and a function
   `build(options, unet, encoders, compute)` that returns such a network with the weights of
   --network_weights loaded. networks/build.py calls it.
2. Add a row to KINDS. Its settings are read without torch (networks/lora_settings.py shows how), so
   that mistakes in --network_args are reported before torch is imported.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from library.errors import Mistake
from library.option_types import did_you_mean
from networks.lora_settings import read_lora_settings

ReadSettings = Callable[[int | None, float, float | None, Sequence[str]], tuple[Any, list[str]]]
"""(--network_dim, --network_alpha, --network_dropout, --network_args) -> settings, and a sentence for
each mistake."""


@dataclass(frozen=True)
class NetworkKind:
    """A kind of network.

    Attributes:
        module: the module with its function `build`.
        read_settings: reads its options, without torch.
        check_module: yields what is wrong with the value of --network_module.
        title: what its files are called in messages.
        weights_key: the ending of a key that each module has in its files; None: any file may fit.
        needs_transformers_encoders: it looks for classes of transformers in the text encoders, and
            doesn't work with this suite's own layers.
        supports_quantized_base: it works on quantized layers (--fp8_base, --base_quant).
    """

    module: str
    read_settings: ReadSettings
    check_module: Callable[[str], Iterable[Mistake]] = lambda name: ()
    title: str = "network"
    weights_key: str | None = None
    needs_transformers_encoders: bool = False
    supports_quantized_base: bool = True


_USE_INSTEAD = {
    "networks.lora_fa": "use networks.lora with loraplus_lr_ratio, which also raises the learning rate of up projections",
    "networks.dylora": "use --network_module lycoris.kohya --network_args algo=dylora",
    "networks.oft": "use --network_module lycoris.kohya --network_args algo=diag-oft",
}
_PIP_NAMES = {"lycoris": "lycoris-lora"}


def _check_external_module(name: str) -> Iterable[Mistake]:
    """Yield what is wrong with the name of another package's module, without importing it."""
    package = name.partition(".")[0]
    if name in _USE_INSTEAD:
        yield Mistake(
            f"--network_module {name}: not part of this suite; {_USE_INSTEAD[name]}",
            ("network_module",),
        )
    elif package == "networks" or not re.fullmatch(r"\w+(\.\w+)*", name):
        hint = did_you_mean(name, [*KINDS, "lycoris.kohya"])
        yield Mistake(
            f"--network_module {name}: no such module; networks.lora trains a LoRA{hint}",
            ("network_module",),
        )
    elif importlib.util.find_spec(package) is None:
        yield Mistake(
            f"--network_module {name}: {package} isn't installed; run pip install {_PIP_NAMES.get(package, package)}",
            ("network_module",),
        )


def _read_external_settings(
    dim: int | None, alpha: float, dropout: float | None, pairs: Sequence[str]
) -> tuple[None, list[str]]:
    """Check only that the arguments are pairs: the other package knows their names."""
    return None, [f"{pair!r}: expected key=value" for pair in pairs if "=" not in pair]


KINDS: Mapping[str, NetworkKind] = {
    "networks.lora": NetworkKind(
        "networks.lora", read_lora_settings, title="LoRA", weights_key=".lora_down.weight"
    ),
}
"""The kinds of this suite, by the value of --network_module."""

EXTERNAL = NetworkKind(
    "networks.external",
    _read_external_settings,
    check_module=_check_external_module,
    needs_transformers_encoders=True,
    supports_quantized_base=False,
)
"""Any other module with sd-scripts' create_network."""


def kind_of(network_module: str | None) -> NetworkKind:
    """Return the kind of network that --network_module names."""
    return KINDS.get(network_module or "networks.lora", EXTERNAL)
