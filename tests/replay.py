"""Replaying a golden training run: its batches and draws go through our step, update and network."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tolerance import (
    ADAPTER_GRADIENT_NORM,
    REPLAYED_LOSS,
    REPLAYED_PREDICTION,
    VECTOR,
    assert_conditioning,
    assert_network,
    assert_norm,
)

from library import images
from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition
from library.models.noise_schedule import NoiseSchedule
from library.models.text_encoders import EncodedText
from library.models.vae import LATENT_SCALE
from library.rng import SampleRng
from library.safetensors_io import load_tensors
from library.size import Size
from library.training.forward import DiffusionLoss
from library.training.objective.prediction import Objective
from library.training.optim.lr_schedules import make_scheduler
from library.training.optim.master_weights import MasterWeightOptimizer
from library.training.optim.optimizer_step import OptimizerStep, StandardStep
from library.training.optim.optimizers import make_optimizer
from library.training.options.objective import LossOptions, NoiseOptions
from library.training.options.optimizer import ScheduleOptions

GOLDEN = Path(__file__).parent / "golden" / "10_training"


class Golden:
    """One recorded run."""

    def __init__(self, name: str):
        self.facts = json.loads((GOLDEN / f"{name}.json").read_text())
        self.trace, _ = load_tensors(GOLDEN / f"{name}.trace.safetensors")
        output = GOLDEN / f"{name}.out.safetensors"
        self.output = load_tensors(output)[0] if output.is_file() else {}

    def batch(self, i: int, *, accumulation: int, text: EncodedText | None) -> Batch:
        facts = self.facts["batches"][i]
        count = len(facts["images"])
        closes = (i + 1) % accumulation == 0
        window = sum(
            len(b["images"])
            for b in self.facts["batches"][
                i - i % accumulation : i - i % accumulation + accumulation
            ]
        )
        return Batch(
            position=BatchPosition(0, i // accumulation, i, 0, window, closes, False),
            paths=tuple(facts["images"]),
            captions=tuple(facts["captions"]),
            images=None,
            latents=self.trace[f"step{i}.latents"] / LATENT_SCALE,
            text=text,
            original_sizes=torch.tensor(facts["original_sizes_hw"]),
            crop_top_lefts=torch.tensor(facts["crop_top_lefts"]),
            target_sizes=torch.tensor(facts["target_sizes_hw"]),
            weights=torch.ones(count),
            conditioning=self._conditioning(facts) if self.facts["name"] == "lllite" else None,
        )

    def _conditioning(self, facts: dict) -> torch.Tensor:
        """The conditions as the reference feeds them: stretched to the bucket, where we crop them as their image."""
        height, width = facts["target_sizes_hw"][0]
        folder = GOLDEN / "dataset" / "data_cond"
        found = [
            images.resize(images.load(folder / name), Size(width, height))
            for name in facts["images"]
        ]
        return torch.stack([torch.from_numpy(images.normalized(pixels)) for pixels in found])

    def rng(self, i: int) -> "Recorded":
        return Recorded(self.trace[f"step{i}.noise"], self.trace[f"step{i}.timesteps"])


class Recorded(SampleRng):
    """The noise and timesteps of one recorded step; nothing else is drawn."""

    def __init__(self, noise: torch.Tensor, timesteps: torch.Tensor):
        super().__init__(0, 0, 0, len(noise))
        object.__setattr__(self, "_noise", noise)
        object.__setattr__(self, "_timesteps", timesteps)

    def normal(self, purpose, shape):
        assert purpose == "noise" and shape == self._noise.shape[1:]
        return self._noise

    def integers(self, purpose, low, high):
        return self._timesteps


def replay(
    golden: Golden,
    models,
    task,
    *,
    optimizer_args: dict,
    schedule: ScheduleOptions,
    loss: LossOptions,
    lr: float,
    accumulation: int,
    cached_text: bool,
    checks_norm: bool = True,
    expected_losses: Sequence[float] | None = None,
    prediction_atol: float = REPLAYED_PREDICTION,
    caption: Callable[[str], str] = str,
):
    """Run the whole trace, asserting context, y, prediction, loss, norm and learning rates as they come."""
    network = task.trainables[0].tensors()
    with torch.no_grad():
        for name, tensor in golden.trace.items():
            if name.startswith("init."):
                network[name.removeprefix("init.")].copy_(tensor)
    groups = task.trainables[0].groups()
    optimizer = make_optimizer("AdamW", optimizer_args, groups, lr)
    total = len(golden.facts["lr_per_step"])
    step = DiffusionLoss(
        task, Objective(NoiseSchedule.sdxl(), False), NoiseOptions(), loss, None
    ).train()
    gradient_step = StandardStep(
        MasterWeightOptimizer(optimizer, groups), max_grad_norm=1.0, scales_loss=False
    )
    update = OptimizerStep(
        step, groups, gradient_step, make_scheduler(optimizer, schedule, total, lr)
    )
    seen = _watch(models.unet)
    for i, expected in enumerate(expected_losses or golden.facts["losses"]):
        text = None
        if cached_text:
            with torch.no_grad():
                text = models.encode_texts(golden.facts["batches"][i]["captions"], 75)
        batch = golden.batch(i, accumulation=accumulation, text=text)
        batch = dataclasses.replace(batch, captions=tuple(map(caption, batch.captions)))
        losses = step(batch, golden.rng(i))
        update.backward(losses, batch.position)
        context, vector, prediction = seen
        if i == 0 and "step0.context" in golden.trace:
            assert_network(context, golden.trace["step0.context"], "context")
        assert_norm(
            context.norm().item(),
            golden.facts["context_norm"][i],
            f"context of step {i}",
            share=VECTOR,
        )
        sizes = torch.cat([batch.original_sizes, batch.crop_top_lefts, batch.target_sizes], dim=1)
        assert_conditioning(vector, golden.trace[f"step{i}.y"], sizes)
        recorded = golden.trace[f"step{i}.unet_out"]
        if i == 0:
            assert_network(prediction, recorded, "first prediction")
        torch.testing.assert_close(prediction, recorded, rtol=0, atol=prediction_atol)
        assert abs(losses.mean().item() - expected) <= REPLAYED_LOSS, f"loss of step {i}"
        if batch.position.is_last_microbatch:
            number = i // accumulation
            rates = list(update.learning_rates().values())
            updated = update.step()
            norm = golden.facts["grad_norm_before_clip"][number]
            if checks_norm:
                name = f"gradient norm of step {number}"
                assert_norm(updated.grad_norm.item(), norm, name, share=ADAPTER_GRADIENT_NORM)
            yield number, rates


def _watch(unet) -> list:
    """Fills itself with context, vector and output of the last U-Net call."""
    seen = [None] * 3

    def note(module, inputs, output):
        seen[:] = [inputs[2].detach(), inputs[3].detach(), output.detach()]

    unet.register_forward_hook(note)
    return seen
