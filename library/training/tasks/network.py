"""NetworkTask: a network (LoRA) beside the layers of the frozen U-Net and text encoders is trained, and saved alone."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.options import CacheOptions, CaptionOptions
from library.data.samples import PRESERVE_OUTPUT
from library.log import log
from library.models.options import ModelOptions
from library.models.sdxl import SdxlModels, WeightPatch
from library.models.text_encoders import TextConditioning
from library.models.textual_inversion import PlaceholderToken
from library.options import Options
from library.param_group import ParamGroup
from library.training.objective.noise import NoisedLatents
from library.training.objective.prediction import Objective
from library.training.options.optimizer import OptimizerOptions
from library.training.options.run import RunOptions
from library.training.options.tasks import PivotalOptions
from library.training.saving.metadata import BASE_MODEL_VERSION, RunFacts, training_metadata
from library.training.tasks.base import Task, cached_text
from library.training.tasks.embedding import TokenPart, add_placeholder_token, embedding_tensors
from library.training.trainable import Trainable
from networks.base import Network
from networks.base_weights import BaseWeights
from networks.kinds import build_network
from networks.lora_file import write_lora
from networks.options import NetworkOptions


class TrainableNetwork(Trainable):
    """The modules of one network."""

    def __init__(
        self,
        network: Network,
        groups: list[ParamGroup],
        extension: str,
        largest_norm: float | None,
        bundled: PlaceholderToken | None = None,
    ):
        """Args:
        largest_norm: of each module's change (--scale_weight_norms).
        bundled: a new word that its files hold too.
        """
        self._bundled = bundled
        self._network, self._groups, self._extension = network, groups, extension
        self._largest_norm = largest_norm

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._network.tensors()

    def groups(self) -> list[ParamGroup]:
        return self._groups

    def after_step(self) -> None:
        if self._largest_norm is not None:
            self._network.limit_norms(self._largest_norm)

    def path(self, stem: Path) -> Path:
        return stem.with_name(f"{stem.name}.{self._extension}")

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = self.path(stem)
        tensors = self._network.file_tensors()
        if self._bundled is not None:
            own = embedding_tensors(self._bundled, dtype)
            tensors |= {f"bundle_emb.{self._bundled.word}.{name}": tensor for name, tensor in own.items()}
        write_lora(path, tensors, metadata, dtype)
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
        text_stops_at: int | None = None,
        token: PivotalOptions | None = None,
    ):
        """Args:
        lr: the base learning rate.
        text_is_cached: captions come encoded, and the text encoders aren't needed.
        token: of a new word that is trained too.
        text_stops_at: the optimizer step after which the text encoders' modules stay as they are.
        """
        self._models, self._num_tokens, self._weighted = models, num_tokens, weighted_captions
        self.is_terse = options.no_metadata
        if text_is_cached:
            self._encoders: tuple[Any, ...] = ()
        else:  # another package's network may look for transformers' own classes
            self._encoders = models.text_layers if options.kind.replaces_layers else models.text_encoders
        self.unet = models.unet
        self.compute_dtype = models.precision.compute
        self._network = build_network(options, self.unet, self._encoders, models.device, models.precision)
        one, two = (lr if own is None else own for own in options.text_encoder_lrs)
        groups = [
            replace(group, stops_at=text_stops_at) if group.name.startswith("textencoder") else group
            for group in self._network.groups(lr if options.unet_lr is None else options.unet_lr, (one, two))
        ]
        trained = {name for group in groups for name in group.parameters}
        for name, parameter in self._network.tensors().items():
            parameter.requires_grad_(name in trained)
        self._trains_text = any(name.startswith("lora_te") for name in trained)
        if text_stops_at is not None and not self._trains_text:
            log.warning("--stop_text_encoder_training changes nothing: the text encoders aren't trained")
        bundled: PlaceholderToken | None = None
        self.parts: list[Trainable] = []
        if token is not None and token.train_token is not None:
            added = add_placeholder_token(models, token.train_token, token.token_init_word, token.token_vectors)
            bundled = added if token.bundle_token else None
            suffix, stops_at = f"-{token.train_token}", token.ti_stop_ratio
            self.parts.append(
                TokenPart(added, token.token_lr or lr, options.save_model_as, suffix=suffix, stops_at=stops_at)
            )
            self._trains_text = True
        network = TrainableNetwork(self._network, groups, options.save_model_as, options.scale_weight_norms, bundled)
        self.parts.insert(0, network)

    @classmethod
    def from_options(cls, models: SdxlModels, options: Options) -> "NetworkTask":
        return cls(
            models,
            options[NetworkOptions],
            lr=options[OptimizerOptions].learning_rate,
            num_tokens=options[ModelOptions].num_tokens,
            text_is_cached=options[CacheOptions].text,
            weighted_captions=options[CaptionOptions].weighted_captions,
            text_stops_at=options[RunOptions].stop_text_encoder_training,
            token=options[PivotalOptions],
        )

    @classmethod
    def change(cls, models: SdxlModels, options: Options) -> WeightPatch | None:
        chosen = options[NetworkOptions]
        if not chosen.base_weights:
            return None
        return BaseWeights(chosen.base_weights, chosen.base_weights_multiplier or (), models.unet, models.text_layers)

    def modules(self) -> list[nn.Module]:
        return [self._network.module, self.unet, *self._encoders]

    def encode_text(self, batch: Batch) -> TextConditioning:
        if batch.text is not None:
            return cached_text(batch.text, self.compute_dtype)
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            return TextConditioning.of(
                self._models.encode_texts(batch.captions, self._num_tokens, weighted=self._weighted)
            )

    def target(self, noisy: NoisedLatents, text: TextConditioning, batch: Batch, objective: Objective) -> Tensor:
        target = super().target(noisy, text, batch, objective)
        preserved = [bool(attributes.get(PRESERVE_OUTPUT)) for attributes in batch.attributes]
        if not any(preserved):
            return target
        with torch.no_grad(), self._switched_off():
            base = self.predict(noisy, self.encode_text(batch) if self._trains_text else text, batch)
        chosen = torch.tensor(preserved, device=target.device)[:, None, None, None]
        return torch.where(chosen, base.to(target.dtype), target)

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        """The models work as if there were no network."""
        self._network.set_multiplier(0.0)
        try:
            yield
        finally:
            self._network.set_multiplier(1.0)

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
        dim, alpha = self._network.shape
        values = {
            "ss_network_module": str(network.network_module),
            "ss_network_dim": str(dim),
            "ss_network_alpha": str(alpha),
        }
        if network.network_args:
            pairs = dict(pair.split("=", 1) for pair in network.network_args)
            values["ss_network_args"] = json.dumps({**pairs, "dropout": pairs.get("dropout", network.network_dropout)})
        return values
