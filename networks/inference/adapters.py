"""AppliedNetworks: networks, control nets and embeddings on a model that generates images."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from library.log import log
from library.models.control import ControlInputs, LLLiteModulation
from library.models.sdxl import SdxlModels
from library.safetensors_io import read_header
from networks.embedding_file import add_bundled_tokens, add_embeddings
from networks.inference.apply import (
    FusedAdapters,
    attach_adapters,
    matched_modules,
    merge_into,
    sum_of_patches,
)
from networks.inference.deltas import ModuleTensors
from networks.inference.key_formats import every_layer
from networks.inference.options import AppliedNetworkOptions
from networks.inference.regional import Regional
from networks.lllite import (
    AttentionProjection,
    ControlNetLLLite,
    attention_projections,
    to_control_inputs,
)
from networks.lllite_file import lllite_from_file

Modulations = list[tuple[AttentionProjection, LLLiteModulation]]


class AppliedNetworks:
    """The `Adapters` of library/generation/adapters.py."""

    def __init__(
        self, options: AppliedNetworkOptions, models: SdxlModels, *, is_regional: bool = False
    ):
        """Read the files and load them onto the model.

        Args:
            options: the files and their strengths.
            models: the model.
            is_regional: whether a mask assigns a region to each network.

        Raises:
            OptionError: if a file can't be read or doesn't fit the model.
        """
        self._device = models.device
        self._dtype = models.precision.compute
        self._option_strengths = options.strengths()
        self._num_merged = options.num_merged
        self._strengths = self._option_strengths[self._num_merged :]  # of unmerged networks
        self._fused: FusedAdapters | None = None
        self._regional: Regional | None = None
        add_embeddings(models, options.textual_inversion_embeddings or ())
        if options.network_weights:
            self._load_networks(options, models, is_regional=is_regional)
        self._control_nets = [
            self._load_control_net(path, strength, ratio, options, models)
            for path, strength, ratio in options.control_nets()
        ]

    def _load_networks(
        self, options: AppliedNetworkOptions, models: SdxlModels, *, is_regional: bool
    ) -> None:
        """Merge, fuse or attach the networks."""
        layers = every_layer(models.unet, models.text_encoders)
        unmerged: dict[int, Mapping[str, ModuleTensors]] = {}
        for i, path in enumerate(options.network_weights or ()):
            if options.network_show_meta:
                log_metadata(path)
            modules = matched_modules(
                path,
                layers,
                models.unet,
                flag="--network_weights",
                allow_partial=options.allow_partial,
            )
            add_bundled_tokens(models, path, flag="--network_weights")
            strength = self._option_strengths[i]
            is_merged = i < self._num_merged
            if is_merged:
                merge_into(layers, modules, strength)
            else:
                unmerged[i - self._num_merged] = modules
            suffix = ", merged" if is_merged else ""
            log.info("%s: %d modules, strength %g%s", path, len(modules), strength, suffix)
        if options.network_pre_calc:
            self._fused = FusedAdapters(layers, unmerged)
            self._fused.fuse(self._strengths)
        elif is_regional and unmerged:
            max_color_codes = options.network_regional_mask_max_color_codes
            self._regional = Regional(self._strengths, max_color_codes)
            attach_adapters(layers, unmerged, self._regional.forward_of)
        else:
            attach_adapters(layers, unmerged, lambda layer: sum_of_patches(self._strengths, layer))

    def _load_control_net(
        self,
        path: Path,
        strength: float,
        ratio: float,
        options: AppliedNetworkOptions,
        models: SdxlModels,
    ) -> "ControlNet":
        net = lllite_from_file(
            path,
            attention_projections(models.unet),
            flag="--control_net_lllite_models",
            allow_partial=options.allow_partial,
        )
        return ControlNet(net.to(self._device, self._dtype), strength, ratio)

    @property
    def num_control_nets(self) -> int:
        return len(self._control_nets)

    @property
    def is_regional(self) -> bool:
        return self._regional is not None

    def set_multipliers(
        self, multipliers: Sequence[float] | None, sub_prompt: int | None = None
    ) -> None:
        """Set the strengths of the networks.

        Args:
            multipliers: one per file; the last one is repeated. None: those of the options.
            sub_prompt: index of the sub-prompt that is being encoded; only the network of its
                region is active. None: all networks are.
        """
        given = self._option_strengths if multipliers is None else list(multipliers)
        for i in range(len(self._strengths)):
            self._strengths[i] = 0.0
            if sub_prompt is None or sub_prompt == i:
                self._strengths[i] = given[min(self._num_merged + i, len(given) - 1)]
        if self._fused is not None:
            self._fused.fuse(self._strengths)

    def prepare_batch(
        self,
        *,
        guide_images: Sequence[Tensor],
        sub_contexts: Sequence[Tensor],
        mask: Tensor | None,
        num_branches: int,
    ) -> Callable[[int, int], ControlInputs | None]:
        """Prepare the denoising of one batch and return the control inputs of its steps.

        Args:
            guide_images: one per control net, [B, 3, H, W] in -1..1. Empty: control nets are off.
            sub_contexts: the context of each sub-prompt, [B, T, 2048]. Empty: prompts aren't split.
            mask: the region of each network, uint8 [H, W, 3].
            num_branches: guidance branches.

        Returns:
            (step index, number of steps) -> control inputs.

        Raises:
            OptionError: if the numbers of sub-prompts and networks don't match.
        """
        if self._regional is not None:
            assert mask is not None
            self._regional.set_batch(sub_contexts, mask)
        if not guide_images:
            return lambda step, steps: None
        modulations = []
        for net, guide_image in zip(self._control_nets, guide_images, strict=True):
            guide_image = guide_image.to(self._device, self._dtype)
            modulations.append(net.modulations(guide_image, num_branches))
        ratios = [net.ratio for net in self._control_nets]
        return _ControlSchedule(modulations, ratios)


class ControlNet:
    """A control net, its strength, and the share of the steps in which it is active."""

    def __init__(self, net: ControlNetLLLite, strength: float, ratio: float):
        self.net = net
        self.strength = strength
        self.ratio = ratio

    @torch.no_grad()
    def modulations(self, guide_image: Tensor, num_branches: int) -> Modulations:
        """Return how the guide images modulate each layer.

        Args:
            guide_image: [B, 3, H, W], one per image; or [1, 3, H, W] for the complete batch.
            num_branches: guidance branches; the conditions of B images are repeated for each.
        """
        modulations = self.net(guide_image, self.strength)
        if len(guide_image) == 1:
            return modulations
        repeated = []
        for projection, modulation in modulations:
            condition = modulation.condition.repeat(num_branches, 1, 1)
            repeated.append((projection, modulation._replace(condition=condition)))
        return repeated


class _ControlSchedule:
    """The control inputs of each step: those of the control nets that are active in it."""

    def __init__(self, modulations: Sequence[Modulations], ratios: Sequence[float]):
        self._modulations = modulations
        self._ratios = ratios
        self._by_active_nets: dict[tuple[bool, ...], ControlInputs] = {}

    def __call__(self, step: int, steps: int) -> ControlInputs:
        is_active = tuple(ratio >= step / steps for ratio in self._ratios)
        if is_active not in self._by_active_nets:
            active: Modulations = []
            for modulations, is_on in zip(self._modulations, is_active, strict=True):
                if is_on:
                    active += modulations
            self._by_active_nets[is_active] = to_control_inputs(active)
        return self._by_active_nets[is_active]


def log_metadata(path: Path) -> None:
    """Log the metadata of a network file (--network_show_meta)."""
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        metadata = read_header(path).metadata
    if metadata:
        log.info("%s: %s", path, json.dumps(metadata, indent=2))
    else:
        log.info("%s: no metadata", path)
