"""NetworkTask: trains a network (LoRA) on the frozen U-Net and text encoders, and saves the network alone."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.samples import PRESERVE_OUTPUT
from library.log import log
from library.models.sdxl import SdxlModels, WeightPatch
from library.models.text_encoders import TextConditioning
from library.models.textual_inversion import PlaceholderToken
from library.param_group import ParamGroup
from library.training.objective.noise import NoisedLatents
from library.training.objective.prediction import Objective
from library.training.options.tasks import PivotalOptions
from library.training.saving.metadata import BASE_MODEL_VERSION
from library.training.tasks.base import Task, TaskSettings
from library.training.tasks.embedding import (
    TrainableToken,
    add_placeholder_token,
    embedding_tensors,
)
from library.training.trainable import Trainable
from networks.base import Network
from networks.base_weights import BaseWeights
from networks.build import build_network
from networks.lora_file import write_lora
from networks.options import NetworkOptions

Groups = tuple[NetworkOptions, PivotalOptions]


class TrainableNetwork(Trainable):
    """The modules of one network."""

    def __init__(
        self,
        network: Network,
        groups: list[ParamGroup],
        extension: str,
        max_norm: float | None,
        bundled: PlaceholderToken | None = None,
    ):
        """Initialize the trainable.

        Args:
            network: the network, attached to the models.
            groups: its trained parameters by learning rate.
            extension: the ending of its files, without a dot.
            max_norm: of each module's change (--scale_weight_norms); None: not limited.
            bundled: a placeholder token that is saved in the network's files too.
        """
        super().__init__(groups, extension)
        self._network, self._max_norm, self._bundled = network, max_norm, bundled

    def tensors(self) -> Mapping[str, nn.Parameter]:
        return self._network.tensors()

    def after_step(self) -> None:
        if self._max_norm is not None:
            self._network.limit_norms(self._max_norm)

    def save(self, stem: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> Path:
        path = self.path(stem)
        tensors = self._network.file_tensors()
        if self._bundled is not None:
            for name, rows in embedding_tensors(self._bundled, dtype).items():
                tensors[f"bundle_emb.{self._bundled.word}.{name}"] = rows
        write_lora(path, tensors, metadata, dtype)
        return path


class NetworkTask(Task[Groups]):
    """Trains one network over the U-Net, the text encoders, or both; with it, if asked, a placeholder token."""

    option_groups = (NetworkOptions, PivotalOptions)
    tracker_name = "network_train"
    modelspec_kind = "/lora"
    default_title = "LoRA"

    def __init__(self, models: SdxlModels, settings: TaskSettings, groups: Groups):
        super().__init__(models, settings, groups)
        self._options, pivotal = groups
        if self._options.kind.needs_transformers_encoders and not settings.text_is_cached:
            # Another package's network may look for transformers' own classes.
            self._encoders = models.text_encoders
        self.is_terse = self._options.no_metadata
        self._network = build_network(
            self._options, self.unet, self._encoders, models.device, models.precision
        )
        network_groups = self._network_groups()
        self._freeze_all_but(network_groups)
        token = self._add_token(pivotal)
        bundled = token if pivotal.bundle_token else None
        options = self._options
        network = TrainableNetwork(
            self._network,
            network_groups,
            options.save_model_as,
            options.scale_weight_norms,
            bundled,
        )
        self.trainables: list[Trainable] = [network]
        if token is not None:
            self.trainables.append(self._trainable_token(token, pivotal))

    def _network_groups(self) -> list[ParamGroup]:
        """Return the network's parameters by learning rate."""
        options, lr, last_step = self._options, self._settings.lr, self._settings.text_last_step
        unet_lr = lr if options.unet_lr is None else options.unet_lr
        lr_1, lr_2 = (lr if text_lr is None else text_lr for text_lr in options.text_encoder_lrs)
        groups = []
        for group in self._network.groups(unet_lr, (lr_1, lr_2)):
            groups.append(
                replace(group, last_step=last_step) if group.is_of_text_encoders else group
            )
        if last_step is not None and not any(group.needs_text_gradients for group in groups):
            log.warning(
                "--stop_text_encoder_training changes nothing: the text encoders aren't trained"
            )
        return groups

    def _freeze_all_but(self, groups: list[ParamGroup]) -> None:
        trained = {name for group in groups for name in group.parameters}
        for name, parameter in self._network.tensors().items():
            parameter.requires_grad_(name in trained)

    def _add_token(self, options: PivotalOptions) -> PlaceholderToken | None:
        """Add the placeholder token to the models, if one is to be trained with the network."""
        if options.train_token is None:
            return None
        return add_placeholder_token(
            self._models, options.train_token, options.token_init_word, options.token_vectors
        )

    def _trainable_token(self, token: PlaceholderToken, options: PivotalOptions) -> TrainableToken:
        last_step = None
        if options.ti_stop_ratio is not None:
            last_step = int(options.ti_stop_ratio * self._settings.total_steps)
        return TrainableToken(
            token,
            options.token_lr or self._settings.lr,
            self._options.save_model_as,
            suffix=f"-{options.train_token}",
            last_step=last_step,
        )

    @classmethod
    def weight_patch(cls, models: SdxlModels, groups: Groups) -> WeightPatch | None:
        options, _ = groups
        if not options.base_weights:
            return None
        multipliers = options.base_weights_multiplier or ()
        return BaseWeights(options.base_weights, multipliers, models.unet, models.text_layers)

    def modules(self) -> list[nn.Module]:
        return [self._network.module, self.unet, *self._encoders]

    def target(
        self, noisy: NoisedLatents, text: TextConditioning, batch: Batch, objective: Objective
    ) -> Tensor:
        """Return the training target; for images with preserve_output, the frozen model's own prediction."""
        target = super().target(noisy, text, batch, objective)
        preserved = [bool(attributes.get(PRESERVE_OUTPUT)) for attributes in batch.attributes]
        if not any(preserved):
            return target
        with torch.no_grad(), self._switched_off():
            base_text = self.encode_text(batch) if self.trains_text else text
            base = self.predict(noisy, base_text, batch)
        mask = torch.tensor(preserved, device=target.device)[:, None, None, None]
        return torch.where(mask, base.to(target.dtype), target)

    @contextmanager
    def _switched_off(self) -> Iterator[None]:
        """Context manager: the models work without the network."""
        self._network.set_multiplier(0.0)
        try:
            yield
        finally:
            self._network.set_multiplier(1.0)

    def metadata(self, common: Mapping[str, str]) -> dict[str, str]:
        """Return the ss_ keys, among them those by which other programs know the network, which `is_terse` keeps."""
        if self.is_terse:
            version = {"ss_v2": "False", "ss_base_model_version": BASE_MODEL_VERSION}
            return version | self._shape_metadata()
        options = self._options
        values = {
            "ss_network_dropout": options.network_dropout,
            "ss_scale_weight_norms": options.scale_weight_norms,
            "ss_unet_lr": options.unet_lr,
            "ss_text_encoder_lr": (options.text_encoder_lr or (None,))[0],
            "ss_training_comment": options.training_comment,
        }
        texts = {key: str(value) for key, value in values.items()}
        return {**common, **self._shape_metadata(), **texts}

    def _shape_metadata(self) -> dict[str, str]:
        options = self._options
        dim, alpha = self._network.shape
        values = {
            "ss_network_module": str(options.network_module),
            "ss_network_dim": str(dim),
            "ss_network_alpha": str(alpha),
        }
        if options.network_args:
            arguments = dict(pair.split("=", 1) for pair in options.network_args)
            dropout = arguments.get("dropout", options.network_dropout)
            values["ss_network_args"] = json.dumps({**arguments, "dropout": dropout})
        return values
