"""Products of bfloat16 on CPUs that have no instructions for them."""

import pytest
import torch
import torch.nn.functional as F

from library.models import products

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("kind", ["linear", "conv2d", "attention"])
def test_emulated_bfloat16_products_and_their_gradients_are_float32s_rounded_and_keep_no_float32(kind, monkeypatch):
    """Against the same in float32 throughout, whose numbers are then rounded."""
    monkeypatch.setattr(products, "cpu_lacks_bfloat16", lambda: True)
    torch.manual_seed(0)
    shapes = {
        "linear": ((2, 7, 6), (5, 6), (5,)),
        "conv2d": ((2, 6, 9, 8), (5, 6, 3, 3), (5,)),
        "attention": ((2, 3, 9, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
    }[kind]
    rest = {"linear": (), "conv2d": ((2, 2), (1, 1)), "attention": ()}[kind]
    reference = {"attention": "scaled_dot_product_attention"}.get(kind, kind)
    narrow = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        found = getattr(products, kind)(*narrow, *rest)
    expected = getattr(F, reference)(*wide, *rest)
    assert torch.equal(found, expected.bfloat16()) and set(saved) == {torch.bfloat16}
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad.float())
    for one, other in zip(narrow, wide, strict=True):
        torch.testing.assert_close(one.grad, other.grad.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("emulated", [True, False])
def test_a_product_is_added_where_the_other_lies(emulated, monkeypatch):
    monkeypatch.setattr(products, "cpu_lacks_bfloat16", lambda: emulated)
    torch.manual_seed(0)
    y, a, b = torch.randn(4, 6).bfloat16(), torch.randn(4, 3).bfloat16(), torch.randn(3, 6).bfloat16()
    expected = (y.float() + 0.5 * (a.float() @ b.float())).bfloat16()
    assert products.add_product(y, a, b, 0.5) is y
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
