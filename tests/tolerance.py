"""How far numbers may be from those of another machine: one rule for every test that compares two computations.

A float32 product, sum or square root has a rounding error of at most u = 2^-24 = 6e-8 of its result. IEEE 754 fixes the
error of single operations, but neither the order of the terms of a sum (which depends on the width of the CPU's vectors,
the blocks of its caches, and the number of threads) nor whether a product and a sum are rounded together (fused
multiply-add), nor the last bit of exp, sin and cos. So two machines, two builds of torch, or two kernels of one build
agree to a bound, never to the bit, and a bound that one machine's numbers happen to keep says nothing. The bounds here
are derived. In eleven settings of kernels and threads (docs/development.md lists the variables), against numbers recorded
on another machine, the largest differences of networks, gradients and latents were a third of their bounds.

    what is compared                    bound                                   why
    networks and their gradients        |d| <= 1e-5 |golden|, as vectors, and   A sum of n terms in random order errs by about
                                        max |d| <= 1e-4 rms(golden)             sqrt(n) u: 3e-6 for the 2,880 terms of a
                                                                                convolution. Normalisation keeps that size
                                                                                through the layers, whose errors are
                                                                                independent: a few 1e-6 as vectors. The largest
                                                                                of 1e5 elements is about 4.5 deviations, and
                                                                                deviations differ between channels.
    norms of gradients                  1e-4 relative                           A norm's error is at most the vector's; the
                                                                                gradients of first layers have passed all others
                                                                                twice, and some are small next to what they are
                                                                                summed from.
    the same, of LoRA and LLLite        1e-3 relative                           Their factors are small differences of such sums.
    gradients that are zero in theory   5e-7 absolute                           All of such a gradient is rounding error: each
                                                                                machine has another one. Those of golden 02
                                                                                are below 1e-7, all others above 5e-4.
    embeddings of timesteps and sizes   2^-23 max(1, angle)                     Frequencies may be off by one unit in the last
                                                                                place (2^-24), which the angle multiplies, and
                                                                                so may angle and cosine.
    schedules, losses, weights          1e-6 relative + 2e-6 absolute           A dozen operations, and differences that cancel
                                                                                (Huber's losses near zero).
    zero terminal SNR                   alpha_bar 1e-6, betas 2e-5, noised      sqrt(alpha_bar) ends at 0.068 and has an error
                                        latents and velocity 4e-6, absolute     of one unit, 4e-9, which is subtracted from
                                                                                itself: at t = 998 that is 2e-5 of the rest,
                                                                                and a beta is one minus a ratio of rests.
    guided predictions                  4e-5 of the golden norm                 Guidance of 7 amplifies the difference of two
                                                                                predictions, each 1e-5 at most, by up to 4 in
                                                                                the golden cases.
    last latents of a generated image   2e-5 of the golden norm                 Steps of a sampler shrink the noise, and its
                                                                                error with it.
    replayed losses, later predictions  1e-5, 1e-4 absolute                     INDEX.md; two threads alone differ by 2.4e-7.
    replayed weights                    LoRA 1e-4, Textual Inversion 1e-5,      AdamW divides by the gradient's own size, so
                                        LLLite 5e-4 absolute; of a fine-tuned   the error of a small gradient counts as much as
                                        model 4e-3 of each change's norm        that of a large one. INDEX.md has both runs.
    weights trained with sums in        all but 1e-3 of them within 1e-4        The same: in a step of 1e-3, an element goes up
    another order (two processes,       absolute                                on one side and down on the other if its
    threads, or parts of a batch)                                               gradient is smaller than its rounding error.
                                                                                Found after 5 steps: none to 13 of 125,888. A
                                                                                wrong gradient moves most of a tensor.

Bit-equality is asked for where both sides are computed in one process by the same kernels on tensors of the same shapes,
or by two runs of one script on one machine: resuming, checkpointing, offloading, caching. It is never asked of recorded
numbers, of random numbers against recorded ones, of two kernels, or of a sample in batches of two sizes.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from library.models.unet_config import SIZE_CHANNELS

VECTOR = 1e-5
"""Of a network's output, or of a gradient: the norm of the difference, as a share of the norm of what is expected."""
ELEMENT = 1e-4
"""The largest difference of such a tensor, as a share of the root mean square of what is expected."""
GRADIENT_NORM = 1e-4
ADAPTER_GRADIENT_NORM = 1e-3
"""Of LoRA and LLLite."""
ZERO_IN_THEORY = 5e-7
"""A gradient that only rounding makes differ from zero: absolute, of its norm."""
GUIDED = 4e-5
LAST_LATENTS = 2e-5
REPLAYED_LOSS, REPLAYED_PREDICTION = 1e-5, 1e-4
REPLAYED_LORA, REPLAYED_EMBEDDING, REPLAYED_LLLITE, REPLAYED_CHANGE = 1e-4, 1e-5, 5e-4, 4e-3
OUTLIERS = 1e-3
"""Of trained weights, the share that may be further off: an element whose gradient is smaller than its rounding error."""
FORMULA = {"rtol": 1e-6, "atol": 2e-6}
"""Schedules, losses and weights."""
ZERO_SNR_ALPHA_BAR = {"rtol": 0.0, "atol": 1e-6}
ZERO_SNR_BETAS = {"rtol": 0.0, "atol": 2e-5}
ZERO_SNR_LATENTS = {"rtol": 0.0, "atol": 4e-6}


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is expected."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()


def assert_network(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Outputs of networks, and gradients."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, (
        f"{name}: {list(found.shape)}, expected {list(expected.shape)}"
    )
    share = distance(found, expected)
    assert share <= VECTOR, f"{name}: {share:.2e} of the norm, at most {VECTOR:.0e}"
    rms = expected.double().square().mean().sqrt().item()
    largest = (found.double() - expected.double()).abs().max().item()
    assert largest <= ELEMENT * rms, (
        f"{name}: {largest / rms:.2e} of the rms, at most {ELEMENT:.0e}"
    )


def assert_norm(
    found: float, expected: float, name: str = "", *, share: float = GRADIENT_NORM
) -> None:
    """Norms of gradients."""
    assert math.isclose(found, expected, rel_tol=share), (
        f"{name}: {found:.8g}, expected {expected:.8g}"
    )


def assert_zero_in_theory(found: float, name: str = "") -> None:
    """The norm of a gradient of which only rounding is left."""
    assert found <= ZERO_IN_THEORY, f"{name}: {found:.2e}, at most {ZERO_IN_THEORY:.0e}"


def assert_embedding(found: Tensor, expected: Tensor, positions: Tensor, name: str = "") -> None:
    """Sinusoidal embeddings, [..., C]. Args: positions: [...]; each is the largest angle of its embedding, as the first frequency is 1."""
    bounds = 2.0**-23 * positions.double().abs().clamp(min=1)[..., None]
    largest = ((found.double() - expected.double()).abs() / bounds).max().item()
    assert largest <= 1, f"{name}: {largest:.2f} times 2^-23 max(1, angle)"


def assert_conditioning(
    found: Tensor, expected: Tensor, sizes: Tensor, name: str = "conditioning"
) -> None:
    """Vectors of pooled text and of embedded sizes, [B, C]. Args: sizes: [B, 6]."""
    count = sizes.shape[1]
    pooled = found.shape[1] - count * SIZE_CHANNELS
    assert_network(found[:, :pooled], expected[:, :pooled], f"{name}: pooled text")
    one, two = (
        vector[:, pooled:].unflatten(1, (count, SIZE_CHANNELS)) for vector in (found, expected)
    )
    assert_embedding(one, two, sizes, f"{name}: sizes")


def assert_trained(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Weights after a few steps of AdamW whose gradients were summed in another order."""
    assert found.keys() == expected.keys()
    far = {
        name: int(((found[name].double() - tensor.double()).abs() > REPLAYED_LORA).sum())
        for name, tensor in expected.items()
    }
    count = sum(tensor.numel() for tensor in expected.values())
    assert sum(far.values()) <= count * OUTLIERS, {
        name: number for name, number in far.items() if number
    }


def assert_formula(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Schedules, losses and weights."""
    torch.testing.assert_close(found, expected, **FORMULA, msg=lambda text: f"{name}: {text}")
