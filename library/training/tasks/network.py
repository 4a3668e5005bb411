"""NetworkTask: a network (LoRA) beside the layers of the frozen U-Net and text encoders is trained, and saved alone."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from library.data.batch import Batch
from library.data.options import CacheOptions, CaptionOptions
from library.log import log
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels
from library.models.text_encoders import TextConditioning
from library.options import Options
from library.param_group import ParamGroup
from library.training.metadata import BASE_MODEL_VERSION, RunFacts, training_metadata
from library.training.options import OptimizerOptions
from library.training.task import Part, Task, cached_text
from networks.lora import LoraNetwork, text_encoder_targets, unet_targets
from networks.lora_file import load_into, network_from_file, read_lora, write_lora
from networks.options import NetworkOptions, read_network_args


class NetworkPart(Part):
    """The modules of one network."""

    def __init__(self, network: LoraNetwork, groups: list[ParamGroup], extension: str, largest_norm: float | None):
        """Args: largest_norm: of each module's change (--scale_weight_norms)."""
        self._network, self._groups, self._extension = network, groups, extension
        self._largest_norm = largest_norm

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(self._network.named_parameters())

    def groups(self) -> list[ParamGroup]:
        return self._groups

    def after_step(self) -> None:
        if self._largest_norm is not None:
            self._network.limit_norms(self._largest_norm)

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = stem.with_name(f"{stem.name}.{self._extension}")
        write_lora(path, self._network.file_tensors(), metadata, dtype)
        return path


class NetworkTask(Task):
    """One network over the U-Net, the text encoders, or both."""

    tracker_name = "network_train"
    modelspec_kind = "/lora"
    default_title = "LoRA"

    def __init__(
        self,
        models: SdxlModels,
        options: NetworkOptions,
        *,
        lr: float,
        num_tokens: int,
        text_is_cached: bool,
        weighted_captions: bool = False,
    ):
        """Args: lr: the base learning rate. text_is_cached: captions come encoded, and the text encoders aren't needed."""
        self._models, self._num_tokens, self._weighted = models, num_tokens, weighted_captions
        self.is_terse = options.no_metadata
        self._encoders = () if text_is_cached else models.text_encoders
        self.unet = models.unet
        self.compute_dtype = models.precision.compute
        self._network = self._build(options, over_text=not (text_is_cached or options.network_train_unet_only))
        one, two = (lr if own is None else own for own in options.text_encoder_lrs)
        groups = self._network.groups(lr if options.unet_lr is None else options.unet_lr, (one, two))
        trained = {name for group in groups for name in group.parameters}
        for name, parameter in self._network.named_parameters():
            parameter.requires_grad_(name in trained)
        self._trains_text = any(name.startswith("lora_te") for name in trained)
        self.parts = [NetworkPart(self._network, groups, options.save_model_as, options.scale_weight_norms)]

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "NetworkTask":
        return cls(
            models,
            options[NetworkOptions],
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            text_is_cached=options[CacheOptions].text,
            weighted_captions=options[CaptionOptions].weighted_captions,
        )

    def _build(self, options: NetworkOptions, *, over_text: bool) -> LoraNetwork:
        settings, _ = read_network_args(options)
        targets = []
        if over_text:
            targets += [
                target
                for number, encoder in enumerate(self._encoders, 1)
                for target in text_encoder_targets(encoder, number)
            ]
        if not options.network_train_text_encoder_only:
            targets += unet_targets(self.unet)
        tensors = None if options.network_weights is None else read_lora(options.network_weights, self.unet)
        # Without weights, neither does the network need numbers.
        with torch.device("meta") if self._models.device.type == "meta" else nullcontext():
            if options.dim_from_weights and tensors is not None:
                # Ranks and alphas are the file's; learning-rate factors hold, dropouts don't (as in sd-scripts).
                settings = replace(settings, dropout=0.0, rank_dropout=0.0, module_dropout=0.0)
                network = network_from_file(targets, tensors, settings)
            else:
                network = LoraNetwork.from_settings(targets, settings)
        if tensors is not None:
            assert options.network_weights is not None
            load_into(network, tensors, source=options.network_weights, allow_partial=options.allow_partial)
        network.to(self._models.device, self._models.precision.trained)
        network.attach()
        if untrainable := network.untrainable():
            log.info(
                "%d modules can't be trained and are saved as they start: %s … (the first text encoder's last layer isn't used)",
                len(untrainable),
                untrainable[0],
            )
        return network

    def modules(self) -> list[nn.Module]:
        return [self._network, self.unet, *self._encoders]

    def encode_text(self, batch: Batch) -> TextConditioning:
        if batch.text is not None:
            return cached_text(batch.text, self.compute_dtype)
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            return TextConditioning.of(
                self._models.encode_texts(batch.captions, self._num_tokens, weighted=self._weighted)
            )

    def metadata(self, options: Options, facts: RunFacts) -> dict[str, str]:
        network = options[NetworkOptions]
        if self.is_terse:
            return {"ss_v2": "False", "ss_base_model_version": BASE_MODEL_VERSION, **self._shape_metadata(network)}
        own = {
            "ss_network_dropout": network.network_dropout,
            "ss_scale_weight_norms": network.scale_weight_norms,
            "ss_unet_lr": network.unet_lr,
            "ss_text_encoder_lr": (network.text_encoder_lr or (None,))[0],
            "ss_training_comment": network.training_comment,
        }
        return (
            training_metadata(options, facts)
            | self._shape_metadata(network)
            | {key: str(value) for key, value in own.items()}
        )

    def _shape_metadata(self, network: NetworkOptions) -> dict[str, str]:
        """The keys by which other programs know the network; written with --no_metadata too."""
        dim: object = self._network.settings.dim
        alpha: object = self._network.settings.alpha
        if network.dim_from_weights:
            shapes = {(lora.rank, lora.alpha) for lora in self._network.loras()}
            dim, alpha = shapes.pop() if len(shapes) == 1 else ("Dynamic", "Dynamic")
        values = {
            "ss_network_module": str(network.network_module),
            "ss_network_dim": str(dim),
            "ss_network_alpha": str(alpha),
        }
        if network.network_args:
            pairs = dict(pair.split("=", 1) for pair in network.network_args)
            values["ss_network_args"] = json.dumps({**pairs, "dropout": pairs.get("dropout", network.network_dropout)})
        return values
