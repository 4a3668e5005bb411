"""Sharding of the U-Net's weights, gradients and optimizer state over the ranks (FSDP2, ZeRO).

A block's weights are gathered while it computes (ZeRO-3), or from its forward to its backward
(ZeRO-1 and ZeRO-2). Its gradients are averaged over the ranks and sharded again. Trained parameters
outside the U-Net (a network, a text encoder, placeholder tokens) are replicated on every rank, and
their gradients are averaged before each optimizer step.

Sources: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023, arXiv:2304.11277;
torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library.models.unet_blocks import BasicTransformerBlock, ResnetBlock2D
from library.param_group import ParamGroup
from library.training.options.distributed import ShardingConfig

if TYPE_CHECKING:  # slow imports, only for runs that shard
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(unet: nn.Module, device: torch.device, world_size: int, config: ShardingConfig) -> None:
    """Replace the weights by DTensors, of which each rank keeps its shard.

    All ranks have the same weights before.

    Args:
        unet: the U-Net.
        device: the one that computes.
        world_size: the number of ranks.
        config: when blocks are gathered, and whether shards are offloaded to RAM.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    # Convolutions are channels_last on GPUs, which can't be sharded.
    for parameter in unet.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (world_size,))
    policy = OffloadPolicy()
    if config.weights_in_ram:
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(
                module, mesh=mesh, reshard_after_forward=config.stage == 3, offload_policy=policy
            )
    # The U-Net's own weights are not resharded after the forward, as the backward follows at once.
    fully_shard(unet, mesh=mesh, reshard_after_forward=False, offload_policy=policy)

    def reshard_without_backward(*_: object) -> None:
        """Reshard the blocks after a forward that no backward follows."""
        if not torch.is_grad_enabled():
            for module in unet.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    unet.register_forward_hook(reshard_without_backward)


class Shards:
    """The trained parameters as this rank steps them: its shards, and the replicated ones.

    Attributes:
        device: the one that computes and steps.
        groups: the parameter groups, in which a local parameter takes the place of each sharded
            one.
    """

    def __init__(
        self,
        unet: nn.Module,
        groups: Sequence[ParamGroup],
        device: torch.device,
        world_size: int,
        config: ShardingConfig,
        *,
        reduces_microbatches: bool,
    ):
        """Create the local parameters.

        Args:
            unet: sharded by shard().
            groups: the trained parameters.
            device: the one that computes and steps.
            world_size: the number of ranks.
            config: as it was given to shard().
            reduces_microbatches: gradients are averaged and sharded after each micro-batch, which
                takes less memory. Otherwise this happens once per optimizer step, as with DDP's
                no_sync(), which sends less; until then each rank has the complete gradients.
        """
        self.device = device
        self._unet, self._world_size, self._config = unet, world_size, config
        self._reduces_microbatches = reduces_microbatches
        self._sharded: dict[nn.Parameter, DTensor] = {}  # by local parameter
        self._sharded_by_name: dict[str, DTensor] = {}
        self._replicated: list[nn.Parameter] = []
        self.groups: list[ParamGroup] = []
        for group in groups:
            parameters = {
                name: self._local(name, parameter) for name, parameter in group.parameters.items()
            }
            self.groups.append(replace(group, parameters=parameters))

    def _local(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not is_sharded([parameter]):
            self._replicated.append(parameter)
            return parameter
        sharded = cast("DTensor", parameter)
        local = nn.Parameter(local_tensor(parameter))
        self._sharded[local] = sharded
        self._sharded_by_name[name] = sharded
        return local

    def replicated(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return the parameters that are the same on all ranks."""
        return {
            name: parameter
            for name, parameter in parameters.items()
            if name not in self._sharded_by_name
        }

    def begin(self, *, is_last_microbatch: bool) -> None:
        """Prepare the U-Net for a micro-batch's forward and backward."""
        unet = cast("FSDPModule", self._unet)
        unet.set_requires_gradient_sync(is_last_microbatch or self._reduces_microbatches)
        # With ZeRO-1 and ZeRO-2, blocks stay gathered until the last micro-batch's backward.
        unet.set_reshard_after_backward(is_last_microbatch or self._config.stage == 3)

    @contextmanager
    def reduced_gradients(self) -> Iterator[None]:
        """Context manager for the step: local parameters have averaged gradients."""
        local_params = [
            local for local, sharded in self._sharded.items() if sharded.grad is not None
        ]
        for local in local_params:
            self.load_shard(local)
        for parameter in self._replicated:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self._world_size
        yield
        for local in local_params:
            self.store_shard(local)

    def source(self, local: nn.Parameter) -> nn.Parameter | None:
        """Return the sharded parameter of a local one.

        Its averaged gradient arrives in backward. None for a replicated parameter, whose gradient
        is not averaged yet.
        """
        return cast("nn.Parameter | None", self._sharded.get(local))

    def load_shard(self, local: nn.Parameter) -> None:
        """Give a local parameter its shard of the weights and of the averaged gradient."""
        sharded = self._sharded[local]
        assert sharded.grad is not None
        local.data = self._on_device(local_tensor(sharded))  # FSDP may have moved the shard
        local.grad = self._on_device(local_tensor(sharded.grad))
        sharded.grad = None

    def _on_device(self, tensor: Tensor) -> Tensor:
        if not self._config.weights_in_ram:
            return tensor
        return tensor.to(self.device, copy=True)

    @torch.no_grad()
    def store_shard(self, local: nn.Parameter) -> None:
        """Copy the stepped weights of a local parameter back to RAM, if shards are offloaded."""
        if self._config.weights_in_ram and local in self._sharded:
            tensor = local_tensor(self._sharded[local])
            tensor.copy_(local)
            local.data = tensor

    def norms(self, norms: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norms of complete gradients, [n].

        Args:
            norms: of the gradients on this rank, [n].
            parameters: the local parameters that they belong to.
        """
        are_sharded = [parameter in self._sharded for parameter in parameters]
        if not any(are_sharded):
            return norms
        squares = norms.square()
        mask = torch.tensor(are_sharded, device=norms.device)
        sums = squares * mask
        torch.distributed.all_reduce(sums)
        return torch.where(mask, sums, squares).sqrt()

    def gather_state(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state with complete tensors. All ranks call it together."""
        return self._map_tensors(optimizer, self._gather)

    def shard_state(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """Return this rank's shards of what gather_state() gave."""
        return self._map_tensors(optimizer, _shard_like)

    def _gather(self, sharded: "DTensor", value: Tensor) -> Tensor:
        if value.shape != sharded.to_local().shape:
            return value  # a step count, for example
        from torch.distributed.tensor import DTensor

        distributed = DTensor.from_local(
            value.to(self.device),
            sharded.device_mesh,
            sharded.placements,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
        return distributed.full_tensor()

    def _map_tensors(
        self, optimizer: Mapping[str, Any], function: Callable[["DTensor", Tensor], Tensor]
    ) -> dict[str, Any]:
        """Apply `function` to the tensors of sharded parameters in the optimizer's state."""
        state: dict[str, dict[str, Any]] = {}
        for name, entries in optimizer["state"].items():
            state[name] = dict(entries)
            if name not in self._sharded_by_name:
                continue
            for key, entry in entries.items():
                if isinstance(entry["value"], Tensor):
                    value = function(self._sharded_by_name[name], entry["value"])
                    state[name][key] = {**entry, "value": value}
        return {**optimizer, "state": state}


def _shard_like(sharded: "DTensor", value: Tensor) -> Tensor:
    if value.shape != sharded.shape:
        return value
    return cast("DTensor", as_sharded(value, sharded)).to_local()


def local_tensor(sharded: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, in the same memory."""
    return cast("DTensor", sharded.detach()).to_local()


def as_sharded(full: Tensor, like: Any) -> Any:
    """Shard a full tensor, which is the same on all ranks, as another one is sharded."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return sharded tensors gathered, in RAM, and the others unchanged.

    All ranks call it together.
    """
    full = {}
    for name, tensor in tensors.items():
        full[name] = tensor.detach()
        if is_sharded([tensor]):
            full[name] = _gather_to_ram(cast("DTensor", full[name]))
    return full


def _gather_to_ram(sharded: "DTensor") -> Tensor:
    # Ranks exchange on the mesh's device, while shards may be in RAM.
    on_device = cast("DTensor", sharded.to(sharded.device_mesh.device_type))
    return on_device.full_tensor().cpu()


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is sharded."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)
