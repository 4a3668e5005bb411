"""EMA: computed by hand, in a file of its own, and without effect on the weights."""

import torch
from running import assert_bit_equal, tensors_of, train_network
from torch import nn

from library.training.optim.ema import Ema


class OneTrainable:
    def __init__(self, dtype=torch.float32):
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def tensors(self):
        return {"weight": self.weight, "frozen": self.frozen}


def test_the_average_is_that_computed_by_hand_with_its_warm_up():
    part = OneTrainable()
    ema = Ema([part], 0.5, None)
    assert list(ema.averages) == ["weight"]
    part.weight.data.fill_(2.0)
    ema.update(1)  # d = 2 / 11
    first = 2 / 11 * 1 + 9 / 11 * 2
    torch.testing.assert_close(ema.averages["weight"], torch.full((3,), first))
    part.weight.data.fill_(5.0)
    ema.update(100)  # d = min(0.5, 101 / 110)
    torch.testing.assert_close(ema.averages["weight"], torch.full((3,), 0.5 * first + 2.5))


def test_weights_are_the_averages_only_within_the_context():
    part = OneTrainable(torch.bfloat16)
    ema = Ema([part], 0.9, torch.device("cpu"))
    ema.averages["weight"].fill_(4.0)
    before = part.weight.data
    with ema.applied():
        assert part.weight.tolist() == [4.0] * 3 and part.weight.dtype is torch.bfloat16
    assert part.weight.data is before or part.weight.data_ptr() == before.data_ptr()


def test_small_steps_of_bfloat16_weights_are_not_lost():
    part = OneTrainable(torch.bfloat16)
    ema = Ema([part], 0.999, None)
    part.weight.data.fill_(1.0078125)  # the next number
    for _ in range(10):
        ema.update(10**6)
    assert 1.00006 < ema.averages["weight"][0] < 1.0001


def test_the_ema_of_a_run_is_between_start_and_end_and_does_not_change_the_run(
    golden_model, images, tmp_path
):
    plain = train_network(golden_model, images, tmp_path / "plain", "--max_train_steps", "3")
    both = train_network(
        golden_model,
        images,
        tmp_path / "ema",
        "--max_train_steps",
        "3",
        "--ema_decay",
        "0.9",
        "--save_every_n_steps",
        "2",
    )
    assert_bit_equal(tensors_of(plain), tensors_of(both))
    assert (tmp_path / "ema" / "lora-step00000002-ema.safetensors").exists()
    average, end = tensors_of(both.with_name("lora-ema.safetensors")), tensors_of(both)
    ups = [name for name in end if name.endswith("lora_up.weight")]  # they start at zero
    inside = [0 < average[name].norm() < end[name].norm() for name in ups]
    assert len(ups) > 100 and all(inside)
