"""Options that trade speed for memory. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class MemoryOptions(OptionGroup):
    """Memory"""

    gradient_checkpointing: bool = option(
        False, "keep fewer activations and compute them again in backward: a third slower, far less memory"
    )
    checkpoint_policy: str = option(
        "full",
        "what --gradient_checkpointing computes again: whole blocks, or (selective) only norms and products of single numbers, "
        "which keeps half of the memory and costs next to no time",
        choices=("full", "selective"),
    )
    cpu_offload_checkpointing: bool = option(
        False, "what --gradient_checkpointing keeps waits in RAM, and returns ahead of its use; for large batches"
    )

    def mistakes(self) -> Iterable[Mistake]:
        for name in ("checkpoint_policy", "cpu_offload_checkpointing"):
            if getattr(self, name) not in (False, "full") and not self.gradient_checkpointing:
                yield Mistake(f"--{name} needs --gradient_checkpointing", (name, "gradient_checkpointing"))
