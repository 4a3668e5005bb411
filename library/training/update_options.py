"""Options of the update: weights of 16 bits and how they are rounded, and steps within backward. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option

_LOOK_AT_ALL = ("prodigy", "dadapt")  # optimizers that find their rate from all gradients together


@dataclass(frozen=True)
class UpdateOptions(OptionGroup):
    """Weights of 16 bits, and steps within backward"""

    full_bf16: bool = option(
        False, "what is trained, and its gradients, are bfloat16: half the memory; needs --mixed_precision bf16"
    )
    full_fp16: bool = option(False, "what is trained, and its gradients, are float16; needs --mixed_precision fp16")
    rounding: str | None = option(
        None,
        "how 16-bit weights are rounded when they are stepped: up or down by chance, so that small steps count on average; with what is "
        "left over kept in 2 more bytes a number; or to nearest, which loses small steps. Unset: stochastic with --full_bf16, nearest with "
        "--full_fp16",
        choices=("stochastic", "kahan", "nearest"),
    )
    fused_backward_pass: bool = option(
        False, "step each tensor as soon as its gradient is there, and free that: gradients take no memory"
    )
    fused_optimizer_groups: int | None = option(
        None, "the same by N groups of tensors, each stepped when its last gradient is there", at_least=1, unset=(0,)
    )
    fused_clip: str = option(
        "tensor",
        "what --max_grad_norm bounds in fused steps: each tensor's gradient alone, or the norm over all, taken from the step before",
        choices=("tensor", "previous_norm"),
    )

    @property
    def is_fused(self) -> bool:
        return self.fused_backward_pass or self.fused_optimizer_groups is not None

    @property
    def rounding_used(self) -> str:
        """The rounding of 16-bit weights; "nearest" also where there are none."""
        return self.rounding or ("stochastic" if self.full_bf16 else "nearest")

    def mistakes(self) -> Iterable[Mistake]:
        if self.full_bf16 and self.full_fp16:
            yield Mistake("--full_bf16 and --full_fp16: give one of them", ("full_bf16", "full_fp16"))
        if self.rounding and not (self.full_bf16 or self.full_fp16):
            yield Mistake(
                f"--rounding {self.rounding}: trained weights are float32, so nothing is rounded; it goes with --full_bf16 or --full_fp16",
                ("rounding",),
            )
        if self.full_fp16 and self.rounding == "stochastic":
            yield Mistake(
                "--rounding stochastic is for --full_bf16; with --full_fp16 take kahan or nearest",
                ("rounding", "full_fp16"),
            )
        if self.fused_backward_pass and self.fused_optimizer_groups:
            yield Mistake(
                "--fused_backward_pass and --fused_optimizer_groups: give one of them",
                ("fused_backward_pass", "fused_optimizer_groups"),
            )
        if self.fused_clip != "tensor" and not self.is_fused:
            yield Mistake("--fused_clip goes with --fused_backward_pass or --fused_optimizer_groups", ("fused_clip",))


def check_update(chosen: UpdateOptions, *, mixed_precision: str, optimizer: str) -> Iterable[Mistake]:
    """Contradictions between the update's options and others. Args: optimizer: its name."""
    for name, wanted in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if getattr(chosen, name) and mixed_precision != wanted:
            yield Mistake(
                f"--{name} needs --mixed_precision {wanted}, got {mixed_precision}", (name, "mixed_precision")
            )
    fused = "fused_backward_pass" if chosen.fused_backward_pass else "fused_optimizer_groups"
    if chosen.is_fused and mixed_precision == "fp16":
        yield Mistake(
            f"--{fused}: float16 gradients may overflow, and a step that was taken in part can't be left out; take --mixed_precision bf16, "
            "or no",
            (fused, "mixed_precision"),
        )
    if chosen.fused_backward_pass and optimizer.lower().startswith(_LOOK_AT_ALL):
        yield Mistake(
            f"--fused_backward_pass: --optimizer_type {optimizer} finds its rate from all gradients together; leave it out, or take "
            "--fused_optimizer_groups, in which each group finds its own",
            ("fused_backward_pass", "optimizer_type"),
        )
