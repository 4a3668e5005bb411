"""Generation: networks, new words and control nets on a model that draws pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.log import log
from library.models.control import ControlInputs, LLLiteModulation
from library.models.sdxl import SdxlModels
from library.safetensors_io import read_header
from networks.embedding_file import add_bundled_words, add_embeddings
from networks.inference.apply import FusedAdapters, attach_adapters, matched_modules, merge_into, summed
from networks.inference.deltas import Parts
from networks.inference.key_formats import every_layer
from networks.inference.options import AppliedNetworkOptions
from networks.inference.regional import Regional
from networks.lllite import ControlNetLLLite, Place, by_block, places
from networks.lllite_file import lllite_from_file


class AppliedNetworks:
    """Networks and control nets on a model: what drawing asks for, `Changes` of library/generation/adapters.py."""

    def __init__(self, options: AppliedNetworkOptions, models: SdxlModels, *, is_regional: bool = False):
        """Read the files and put them on the model.

        Args: is_regional: a mask says where each network works.

        Raises OptionError for files that can't be read or don't fit.
        """
        self._device, self._dtype = models.device, models.precision.compute
        self._own_strengths = options.strengths()
        self._num_merged = options.num_merged
        self._strengths = self._own_strengths[self._num_merged :]  # of those beside the model
        self._folded: FusedAdapters | None = None
        self._regional: Regional | None = None
        add_embeddings(models, options.textual_inversion_embeddings or ())
        if options.network_weights:
            self._apply(options, models, is_regional=is_regional)
        self._nets = [
            ControlNet(
                lllite_from_file(path, places(models.unet), flag="--control_net_lllite_models", allow_partial=options.allow_partial)
                .to(self._device, self._dtype), strength, share,
            )
            for path, strength, share in options.control_nets()
        ]  # fmt: skip

    def _apply(self, options: AppliedNetworkOptions, models: SdxlModels, *, is_regional: bool) -> None:
        layers = every_layer(models.unet, models.text_encoders)
        files = options.network_weights or ()
        beside: dict[int, Mapping[str, Parts]] = {}
        for i, path in enumerate(files):
            if options.network_show_meta:
                tell_metadata(path)
            modules = matched_modules(path, layers, models.unet, flag="--network_weights", allow_partial=options.allow_partial)  # fmt: skip
            add_bundled_words(models, path, flag="--network_weights")
            if i < options.num_merged:
                merge_into(layers, modules, self._own_strengths[i])
            else:
                beside[i - self._num_merged] = modules
            log.info(
                "%s: %d modules, strength %g%s",
                path,
                len(modules),
                self._own_strengths[i],
                ", merged" if i < options.num_merged else "",
            )
        if options.network_pre_calc:
            self._folded = FusedAdapters(layers, beside)
            self._folded.fold(self._strengths)
        elif is_regional and beside:
            self._regional = Regional(self._strengths, options.network_regional_mask_max_color_codes)
            attach_adapters(layers, beside, self._regional.forward_of)
        else:
            attach_adapters(layers, beside, lambda one: summed(self._strengths, one))

    @property
    def num_guides(self) -> int:
        return len(self._nets)

    @property
    def is_regional(self) -> bool:
        return self._regional is not None

    def set_multipliers(self, multipliers: Sequence[float] | None, sub_prompt: int | None = None) -> None:
        """The strengths from now on, of all files in turn; the last one holds for all behind it, None: those of the options.

        Args: sub_prompt: while this one is encoded, only the network of its region works.
        """
        given = self._own_strengths if multipliers is None else list(multipliers)
        for i in range(len(self._strengths)):
            own = given[min(self._num_merged + i, len(given) - 1)]
            self._strengths[i] = own if sub_prompt in (None, i) else 0.0
        if self._folded is not None:
            self._folded.fold(self._strengths)

    def conditions(
        self, *, guides: Sequence[Tensor], sub_contexts: Sequence[Tensor], mask: Tensor | None, parts: int
    ) -> Callable[[int, int], ControlInputs | None]:
        """What else reaches the U-Net while one batch is drawn, by (step, steps).

        Args:
            guides: one for each control net, [B, 3, H, W] in -1..1; none: they are off.
            sub_contexts: of each sub-prompt, [B, T, 2048]; none where prompts aren't split.
            mask: which network works where, uint8 [H, W, 3].
            parts: the U-Net's batch is so many times the pictures.

        Raises OptionError if sub-prompts and networks don't go together.
        """
        if self._regional is not None:
            assert mask is not None
            self._regional.set_places(sub_contexts, mask)
        if not guides:
            return lambda step, steps: None
        with torch.no_grad():
            steered = [
                net.steerings(guide.to(self._device, self._dtype), parts)
                for net, guide in zip(self._nets, guides, strict=True)
            ]
        made: dict[tuple[bool, ...], ControlInputs] = {}

        def at(step: int, steps: int) -> ControlInputs | None:
            works = tuple(net.share >= step / steps for net in self._nets)
            if works not in made:
                active = [own for own, on in zip(steered, works, strict=True) if on]
                made[works] = by_block(pair for pairs in active for pair in pairs)
            return made[works]

        return at


class ControlNet:
    """A control net with its strength, and the share of the steps in which it works."""

    def __init__(self, net: ControlNetLLLite, strength: float, share: float):
        self.net, self.strength, self.share = net, strength, share

    def steerings(self, guide: Tensor, parts: int) -> list[tuple[Place, LLLiteModulation]]:
        """Of one guide image for all pictures of a batch, or one for each, repeated for each part of the guidance."""
        found = self.net(guide, self.strength)
        if len(guide) == 1:
            return found
        return [(place, one._replace(condition=one.condition.repeat(parts, 1, 1))) for place, one in found]


def tell_metadata(path: Path) -> None:
    """--network_show_meta: a network file's own words."""
    metadata = read_header(path).metadata if path.suffix == ".safetensors" else {}
    log.info("%s: %s", path, json.dumps(metadata, indent=2) if metadata else "no metadata")
