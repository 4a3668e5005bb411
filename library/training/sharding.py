"""Sharding: the U-Net's weights, their gradients and the optimizer's state lie in parts, one on each process (FSDP2).

A block's weights are whole only while it computes; its gradients are averaged over the processes and cut again. accelerate's
configuration asks for it (configs/accelerate/fsdp2.yaml). What is trained beside the U-Net (a network, a text encoder, a new word)
is whole on every process, and its gradients are averaged when a window closes.

Source: Zhao et al. 2023, arXiv:2304.11277; torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from library.errors import Mistake, OptionError
from library.models.unet_blocks import BasicTransformerBlock, ResnetBlock2D
from library.options import Options
from library.param_group import ParamGroup
from library.training.compile_options import CompileOptions
from library.training.memory_options import MemoryOptions
from library.training.options import EmaOptions, OptimizerOptions
from library.training.update_options import UpdateOptions

if TYPE_CHECKING:  # an import that takes its time, for runs that shard
    from torch.distributed.tensor import DTensor

_NUMBER_BY_NUMBER = ("adam", "adamw", "sgd", "sgdnesterov", "lion", "nadam", "radam", "rmsprop")


def refuse_with_shards(options: Options, *, trains_unet: bool) -> None:
    """Raises OptionError with what can't go with a sharded U-Net. Args: trains_unet: it is trained itself."""
    update, memory = options[UpdateOptions], options[MemoryOptions]
    flags: dict[str, object] = {
        "--fused_backward_pass, --fused_optimizer_groups": update.is_fused,
        "--torch_compile": options[CompileOptions].torch_compile,
        "--fp8_base, --fp8_base_unet, --base_quant": memory.fp8_base or memory.fp8_base_unet or memory.base_quant,
        "--cpu_offload_checkpointing": memory.cpu_offload_checkpointing,
        "--blocks_to_swap, --optimizer_offload": memory.blocks_to_swap or memory.optimizer_offload,
    }
    if trains_unet:
        name = options[OptimizerOptions].name
        flags |= {
            "--full_bf16, --full_fp16": update.full_bf16 or update.full_fp16,
            "--ema_decay": options[EmaOptions].ema_decay,
            f"--optimizer_type {name}, which doesn't step each number by itself,": name.lower()
            not in _NUMBER_BY_NUMBER,
        }
    if wrong := [flag for flag, is_on in flags.items() if is_on]:
        raise OptionError(*(Mistake(f"{flag} can't go with FSDP; leave one of them out", ()) for flag in wrong))


def shard(unet: nn.Module, device: torch.device, processes: int) -> None:
    """Leave each process its part of the weights, as DTensors. All processes hold the same whole ones before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in unet.parameters():  # on cards convolutions lie channels_last, which can't be cut
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (processes,))
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)


class Shards:
    """What is trained, as each process steps it: of sharded parameters its own part, others whole."""

    def __init__(self, groups: Sequence[ParamGroup], processes: int):
        self._processes = processes
        self._own: dict[nn.Parameter, nn.Parameter] = {}
        self._whole: list[nn.Parameter] = []
        self._sharded: dict[str, DTensor] = {}  # by name
        self.groups = [
            replace(group, parameters={name: self._stepped(name, p) for name, p in group.parameters.items()})
            for group in groups
        ]
        self._is_part = torch.tensor(
            [name in self._sharded for group in groups for name in group.parameters],
            device=next(iter(groups[0].parameters.values())).device,
        )

    def _stepped(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if not is_sharded([parameter]):
            self._whole.append(parameter)
            return parameter
        self._sharded[name] = cast("DTensor", parameter)
        self._own[parameter] = nn.Parameter(_here(parameter))
        return self._own[parameter]

    def replicated(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that are the same on all processes."""
        return {name: parameter for name, parameter in trained.items() if name not in self._sharded}

    @torch.no_grad()
    def exchange(self) -> None:
        """Behind the backward that closes a window: every gradient goes, averaged, to what is stepped."""
        for sharded, own in self._own.items():
            own.data = _here(sharded)  # FSDP may have moved it
            own.grad, sharded.grad = None if sharded.grad is None else _here(sharded.grad), None
        for parameter in self._whole:
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self._processes

    def norms(self, norms: Tensor) -> Tensor:
        """Of whole gradients. Args: norms: of those that lie here, in the groups' order; [n]."""
        squares = norms.square()
        summed = squares * self._is_part
        torch.distributed.all_reduce(summed)
        return torch.where(self._is_part, summed, squares).sqrt()

    def gathered(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state of all processes, by whole tensors."""
        return self._with_values(optimizer, self._joined)

    def cut(self, optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """This process's part of what gathered() gave."""
        return self._with_values(
            optimizer,
            lambda sharded, value: as_sharded(value, sharded).to_local() if value.shape == sharded.shape else value,
        )

    def _joined(self, sharded: "DTensor", value: Tensor) -> Tensor:
        if value.shape != sharded.to_local().shape:
            return value  # a number
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            value.to(sharded.device),
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
        name: cast("DTensor", tensor.detach()).full_tensor().cpu() if is_sharded([tensor]) else tensor.detach()
        for name, tensor in tensors.items()
    }


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)
