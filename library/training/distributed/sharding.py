"""Sharding: the U-Net's weights, their gradients and the optimizer's state lie in parts, one on each process (FSDP2, ZeRO).

A block's weights are whole only while it computes (ZeRO-3) or from its forward to its backward (ZeRO-2); its gradients are averaged
over the processes and cut again. What is trained beside the U-Net (a network, a text encoder, a new word) is whole on every process,
and its gradients are averaged when a window closes.

Sources: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO); Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library.models.unet_blocks import BasicTransformerBlock, ResnetBlock2D
from library.param_group import ParamGroup
from library.training.options.distributed import ShardingConfig

if TYPE_CHECKING:  # imports that take their time, for runs that shard
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def shard(unet: nn.Module, device: torch.device, processes: int, zero: ShardingConfig) -> None:
    """Leave each process its part of the weights, as DTensors. All processes hold the same whole ones before.

    Args: device: the one that computes. zero: when blocks are whole, and where parts lie.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    for parameter in unet.parameters():  # on cards convolutions lie channels_last, which can't be cut
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (processes,))
    in_ram = CPUOffloadPolicy(pin_memory=device.type == "cuda") if zero.weights_in_ram else OffloadPolicy()
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(module, mesh=mesh, reshard_after_forward=zero.stage == 3, offload_policy=in_ram)
    fully_shard(unet, mesh=mesh, reshard_after_forward=False, offload_policy=in_ram)  # its backward follows at once

    def cut_again(*_: object) -> None:
        """Behind a forward that no backward follows, which would leave blocks whole."""
        if not torch.is_grad_enabled():
            for module in unet.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    unet.register_forward_hook(cut_again)


class Shards:
    """What is trained, as each process steps it: of sharded parameters its own part, others whole.

    Attributes:
        device: the one that computes and steps.
    """

    def __init__(
        self,
        unet: nn.Module,
        groups: Sequence[ParamGroup],
        device: torch.device,
        processes: int,
        zero: ShardingConfig,
        *,
        adds_up_parts: bool,
    ):
        """Args:
        unet: sharded.
        zero: as it was given to shard().
        adds_up_parts: each micro-batch's gradients are averaged and cut, which takes less memory; else those of a whole window at
            once, as DDP's no_sync() has it, which sends less: until then each process has whole ones.
        """
        self.device = device
        self._unet, self._processes, self._zero, self._adds_up_parts = unet, processes, zero, adds_up_parts
        self._parts: dict[nn.Parameter, DTensor] = {}  # what is stepped: of which it is a part
        self._whole: list[nn.Parameter] = []
        self._sharded: dict[str, DTensor] = {}  # by name
        self.groups = [
            replace(group, parameters={name: self._stepped(name, p) for name, p in group.parameters.items()})
            for group in groups
        ]

    def _stepped(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not is_sharded([parameter]):
            self._whole.append(parameter)
            return parameter
        self._sharded[name] = cast("DTensor", parameter)
        own = nn.Parameter(_here(parameter))
        self._parts[own] = self._sharded[name]
        return own

    def replicated(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that are the same on all processes."""
        return {name: parameter for name, parameter in trained.items() if name not in self._sharded}

    def begin(self, *, is_last_microbatch: bool) -> None:
        """Before a micro-batch's forward."""
        unet = cast("FSDPModule", self._unet)
        unet.set_requires_gradient_sync(is_last_microbatch or self._adds_up_parts)
        # Where blocks may be whole at once, they stay so until the window's last backward.
        unet.set_reshard_after_backward(is_last_microbatch or self._zero.stage == 3)

    @contextmanager
    def reduced_gradients(self) -> Iterator[None]:
        """Around the step, behind the backward that closes a window: every gradient goes, averaged, to what is stepped."""
        waiting = [own for own, sharded in self._parts.items() if sharded.grad is not None]
        for own in waiting:
            self.take(own)
        for parameter in self._whole:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self._processes
        yield
        for own in waiting:
            self.store_shard(own)

    def source(self, own: nn.Parameter) -> nn.Parameter | None:
        """Where the averaged gradient of a part arrives; None for what is whole, whose gradient isn't averaged yet."""
        return cast("nn.Parameter | None", self._parts.get(own))

    def take(self, own: nn.Parameter) -> None:
        """Put a part and its gradient, which has arrived, where it is stepped."""
        sharded = self._parts[own]
        assert sharded.grad is not None
        own.data = self._visiting(_here(sharded))  # FSDP may have moved it
        own.grad, sharded.grad = self._visiting(_here(sharded.grad)), None

    def _visiting(self, part: Tensor) -> Tensor:
        return part.to(self.device, copy=True) if self._zero.weights_in_ram else part

    @torch.no_grad()
    def store_shard(self, own: nn.Parameter) -> None:
        """Behind its step: what was visiting the device goes home."""
        if self._zero.weights_in_ram and own in self._parts:
            part = _here(self._parts[own])
            part.copy_(own)
            own.data = part

    def norms(self, norms: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Of whole gradients. Args: norms: of those that lie here, of these parameters; [n]."""
        are_parts = [parameter in self._parts for parameter in parameters]
        if not any(are_parts):
            return norms
        squares = norms.square()
        is_part = torch.tensor(are_parts, device=norms.device)
        summed = squares * is_part
        torch.distributed.all_reduce(summed)
        return torch.where(is_part, summed, squares).sqrt()

    def gathered(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state of all processes, by whole tensors."""
        return self._with_values(optimizer, self._whole_state)

    def cut(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """This process's part of what gathered() gave."""
        return self._with_values(
            optimizer,
            lambda sharded, value: as_sharded(value, sharded).to_local() if value.shape == sharded.shape else value,
        )

    def _whole_state(self, sharded: "DTensor", value: Tensor) -> Tensor:
        if value.shape != sharded.to_local().shape:
            return value  # a number
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value.to(self.device),
            sharded.device_mesh,
            sharded.placements,
            shape=sharded.shape,
            stride=sharded.stride(),
        ).full_tensor()

    def _with_values(self, optimizer: Mapping[str, Any], change: Any) -> dict[str, Any]:
        state = {
            name: {
                key: {**entry, "value": change(self._sharded[name], entry["value"])}
                if name in self._sharded and isinstance(entry["value"], Tensor)
                else entry
                for key, entry in entries.items()
            }
            for name, entries in optimizer["state"].items()
        }
        return {**optimizer, "state": state}


def _here(sharded: Tensor) -> Tensor:
    """The part that lies on this process; the same memory."""
    return cast("DTensor", sharded.detach()).to_local()


def as_sharded(whole: Tensor, like: Any) -> Any:
    """A whole tensor, the same on all processes, in parts as another lies."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device, like.dtype), like.device_mesh, like.placements)


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded ones joined, in RAM; others as they are. All processes call it together."""
    return {
        name: _joined(cast("DTensor", tensor.detach())) if is_sharded([tensor]) else tensor.detach()
        for name, tensor in tensors.items()
    }


def _joined(sharded: "DTensor") -> Tensor:
    on_device = cast(
        "DTensor", sharded.to(sharded.device_mesh.device_type)
    )  # where processes exchange; parts may lie in RAM
    return on_device.full_tensor().cpu()


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)
