"""Options of sdxl_gen_img.py about networks, new words and control nets. No torch here.

Names and meanings: contract, options.tsv.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.option_types import did_you_mean
from library.options import OptionGroup, option

_MODULES = ("networks.lora", "networks.lora_fa", "networks.dylora", "lycoris.kohya")
_MOST_COLOR_CODES = 7  # three bits, and 0 is none


@dataclass(frozen=True)
class AppliedNetworkOptions(OptionGroup):
    """Networks, new words and control nets"""

    network_weights: tuple[Path, ...] | None = option(
        None, "network files: LoRA, LoHa, LoKr, with DoRA or without, in kohya's, Diffusers' or PEFT's spelling"
    )
    network_module: tuple[str, ...] | None = option(
        None, "kind of each network; may be left out, as the files themselves say it"
    )
    network_mul: tuple[float, ...] | None = option(
        None, "strength of each network; 1 where one is missing; --am within a prompt wins"
    )
    network_args: tuple[str, ...] | None = option(
        None, "arguments of the networks", no_effect="the files say everything that is needed"
    )
    network_show_meta: bool = option(False, "tell the metadata of the network files", stored_in_image=False)
    network_merge_n_models: int | None = option(
        None, "merge the first N networks into the model, at their --network_mul; the others work beside it", at_least=0
    )
    network_merge: bool = option(False, "merge all networks into the model; wins over --network_merge_n_models")
    network_pre_calc: bool = option(
        False, "fold the networks into the weights whenever strengths change: faster steps, twice the memory of what they cover"
    )  # fmt: skip
    network_regional_mask_max_color_codes: int | None = option(
        None, "colours of the region mask: network 1 works where it is red, 2 green, 3 yellow, 4 blue, 5 magenta, 6 cyan, 7 white; unset: one channel for each network, three at most",
        at_least=1, at_most=_MOST_COLOR_CODES,
    )  # fmt: skip
    allow_partial: bool = option(False, "take files of which some modules don't fit the model")
    textual_inversion_embeddings: tuple[Path, ...] | None = option(
        None, "embedding files; each is the word that its file is called"
    )
    control_net_lllite_models: tuple[Path, ...] | None = option(
        None, "ControlNet-LLLite files; each takes one of --guide_image_path for a picture"
    )
    control_net_multipliers: tuple[float, ...] | None = option(
        None, "strength of each control net; 1 where one is missing"
    )
    control_net_ratios: tuple[float, ...] | None = option(
        None, "share of the steps, from the first one, in which each control net works; 1 where one is missing", at_least=0, at_most=1
    )  # fmt: skip

    @property
    def num_merged(self) -> int:
        count = len(self.network_weights or ())
        return count if self.network_merge else min(self.network_merge_n_models or 0, count)

    @property
    def num_beside(self) -> int:
        """Those that aren't merged: --mask_path says where each of them works."""
        return len(self.network_weights or ()) - self.num_merged

    def strengths(self) -> list[float]:
        return _filled(self.network_mul, len(self.network_weights or ()))

    def control_nets(self) -> list[tuple[Path, float, float]]:
        """(file, strength, share of the steps) of each."""
        files = self.control_net_lllite_models or ()
        strengths, shares = (
            _filled(given, len(files)) for given in (self.control_net_multipliers, self.control_net_ratios)
        )
        return list(zip(files, strengths, shares, strict=True))

    def mistakes(self) -> Iterable[Mistake]:
        files, modules = self.network_weights or (), self.network_module or ()
        if len(files) < len(modules):
            yield Mistake(
                f"--network_module: {len(modules)} networks, but --network_weights has {len(files)} files", ("network_weights",)
            )  # fmt: skip
        for name in modules:
            if name not in _MODULES:
                hint = did_you_mean(name, _MODULES) or "; files are read by their keys, so it may be left out"
                yield Mistake(f"--network_module {name}: pictures can't be drawn with such a network{hint}", ("network_module",))  # fmt: skip
        for flag, given, count in (
            ("network_mul", self.network_mul, len(files)),
            ("control_net_multipliers", self.control_net_multipliers, len(self.control_net_lllite_models or ())),
            ("control_net_ratios", self.control_net_ratios, len(self.control_net_lllite_models or ())),
        ):
            if len(given or ()) > count:
                yield Mistake(f"--{flag}: {len(given or ())} numbers for {count} files", (flag,))
        for flag, paths in (
            ("network_weights", files),
            ("textual_inversion_embeddings", self.textual_inversion_embeddings or ()),
            ("control_net_lllite_models", self.control_net_lllite_models or ()),
        ):
            for path in paths:
                if not path.is_file():
                    yield Mistake(f"--{flag} {path}: {'is a folder; a file is needed' if path.is_dir() else 'no such file'}", (flag,))  # fmt: skip
        words = [path.stem for path in self.textual_inversion_embeddings or ()]
        for word in {word for word in words if words.count(word) > 1}:
            yield Mistake(f"--textual_inversion_embeddings: two files are called {word}", ("textual_inversion_embeddings",))  # fmt: skip
        if self.network_regional_mask_max_color_codes and self.network_pre_calc:
            yield Mistake(
                "--network_pre_calc can't go with --network_regional_mask_max_color_codes: weights have no regions",
                ("network_pre_calc", "network_regional_mask_max_color_codes"),
            )


def _filled(given: tuple[float, ...] | None, count: int) -> list[float]:
    own = list(given or ())
    return own + [1.0] * (count - len(own))
