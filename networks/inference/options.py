"""Options of sdxl_gen_img.py for networks, embeddings and control nets. No torch here.

Names and meanings: contract, options.tsv.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.option_types import did_you_mean
from library.options import OptionGroup, option

_MODULES = ("networks.lora", "networks.lora_fa", "networks.dylora", "lycoris.kohya")
_MAX_COLOR_CODES = 7  # three bits, without 0


@dataclass(frozen=True)
class AppliedNetworkOptions(OptionGroup):
    """Networks, embeddings and control nets."""

    network_weights: tuple[Path, ...] | None = option(
        None,
        "network files: LoRA, LoHa, LoKr, with or without DoRA, with keys of kohya, Diffusers or "
        "PEFT",
    )
    network_module: tuple[str, ...] | None = option(
        None, "kind of each network; may be left out, because it is read from the files"
    )
    network_mul: tuple[float, ...] | None = option(
        None, "strength of each network; 1 where it is missing; --am within a prompt wins"
    )
    network_args: tuple[str, ...] | None = option(
        None, "arguments of the networks", no_effect="the files contain all settings"
    )
    network_show_meta: bool = option(
        False, "log the metadata of the network files", stored_in_image=False
    )
    network_merge_n_models: int | None = option(
        None,
        "merge the first N networks into the model with their --network_mul; the others stay "
        "separate",
        at_least=0,
    )
    network_merge: bool = option(
        False, "merge all networks into the model; wins over --network_merge_n_models"
    )
    network_pre_calc: bool = option(
        False,
        "fuse the networks into the weights whenever strengths change: faster steps, "
        "twice the memory of the layers that they change",
    )
    network_regional_mask_max_color_codes: int | None = option(
        None,
        "number of colors of the region mask: network 1 works where it is red, 2 green, 3 yellow, "
        "4 blue, 5 magenta, 6 cyan, 7 white; unset: one color channel per network, at most three",
        at_least=1,
        at_most=_MAX_COLOR_CODES,
    )
    allow_partial: bool = option(
        False, "accept files of which some modules don't fit the model; those are ignored"
    )
    textual_inversion_embeddings: tuple[Path, ...] | None = option(
        None, "embedding files (textual inversion); the file name is the token in prompts"
    )
    control_net_lllite_models: tuple[Path, ...] | None = option(
        None, "ControlNet-LLLite files; each takes one image of --guide_image_path per image"
    )
    control_net_multipliers: tuple[float, ...] | None = option(
        None, "strength of each control net; 1 where it is missing"
    )
    control_net_ratios: tuple[float, ...] | None = option(
        None,
        "share of the steps, from the first one, in which each control net is active; "
        "1 where it is missing",
        at_least=0,
        at_most=1,
    )

    @property
    def num_merged(self) -> int:
        """Number of networks that are merged into the model."""
        count = len(self.network_weights or ())
        if self.network_merge:
            return count
        return min(self.network_merge_n_models or 0, count)

    @property
    def num_unmerged(self) -> int:
        """Number of other networks; --mask_path assigns a region to each of them."""
        return len(self.network_weights or ()) - self.num_merged

    def strengths(self) -> list[float]:
        """Return the strength of each network."""
        return _filled(self.network_mul, len(self.network_weights or ()))

    def control_nets(self) -> list[tuple[Path, float, float]]:
        """Return (file, strength, share of the steps) of each control net."""
        files = self.control_net_lllite_models or ()
        strengths = _filled(self.control_net_multipliers, len(files))
        ratios = _filled(self.control_net_ratios, len(files))
        return list(zip(files, strengths, ratios, strict=True))

    def mistakes(self) -> Iterable[Mistake]:
        networks = self.network_weights or ()
        control_nets = self.control_net_lllite_models or ()
        embeddings = self.textual_inversion_embeddings or ()
        yield from _wrong_modules(self.network_module or (), len(networks))
        yield from _too_many("network_mul", self.network_mul, len(networks))
        yield from _too_many(
            "control_net_multipliers", self.control_net_multipliers, len(control_nets)
        )
        yield from _too_many("control_net_ratios", self.control_net_ratios, len(control_nets))
        yield from _missing_files("network_weights", networks)
        yield from _missing_files("textual_inversion_embeddings", embeddings)
        yield from _missing_files("control_net_lllite_models", control_nets)
        yield from _duplicate_tokens(embeddings)
        if self.network_regional_mask_max_color_codes and self.network_pre_calc:
            yield Mistake(
                "--network_pre_calc can't be combined with "
                "--network_regional_mask_max_color_codes: weights have no regions",
                ("network_pre_calc", "network_regional_mask_max_color_codes"),
            )


def _wrong_modules(modules: Sequence[str], num_files: int) -> Iterable[Mistake]:
    if num_files < len(modules):
        yield Mistake(
            f"--network_module: {len(modules)} networks, but --network_weights has "
            f"{num_files} files",
            ("network_weights",),
        )
    for name in modules:
        if name not in _MODULES:
            hint = did_you_mean(name, _MODULES)
            if not hint:
                hint = "; the kind is read from the files, so the option may be left out"
            yield Mistake(
                f"--network_module {name}: this kind of network isn't supported{hint}",
                ("network_module",),
            )


def _too_many(flag: str, values: Sequence[float] | None, num_files: int) -> Iterable[Mistake]:
    count = len(values or ())
    if count > num_files:
        yield Mistake(f"--{flag}: {count} values for {num_files} files", (flag,))


def _missing_files(flag: str, paths: Sequence[Path]) -> Iterable[Mistake]:
    for path in paths:
        if path.is_dir():
            yield Mistake(f"--{flag} {path}: this is a folder; a file is needed", (flag,))
        elif not path.is_file():
            yield Mistake(f"--{flag} {path}: no such file", (flag,))


def _duplicate_tokens(embeddings: Sequence[Path]) -> Iterable[Mistake]:
    tokens = [path.stem for path in embeddings]
    for token in sorted(set(tokens)):
        if tokens.count(token) > 1:
            yield Mistake(
                f"--textual_inversion_embeddings: two files are named {token}",
                ("textual_inversion_embeddings",),
            )


def _filled(given: Sequence[float] | None, count: int) -> list[float]:
    """Return the given values, with 1 for those that are missing."""
    values = list(given or ())
    return values + [1.0] * (count - len(values))
