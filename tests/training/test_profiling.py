"""Operations and memory, against what is worked out by hand."""

import torch
from torch.nn import functional as F

from vlskv_ray.training.profiling import flop_counter, peak_bytes


def test_operations_of_products_and_attention_forward_and_back() -> None:
    x, w = torch.randn(2, 10, 8), torch.randn(8, 6, requires_grad=True)
    q = torch.randn(2, 3, 10, 4, requires_grad=True)
    with flop_counter() as counter:
        (x @ w).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 20 * 8 * 6)  # and of the weight's gradient; x has none
    with flop_counter() as counter:
        output = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    forward = counter.get_total_flops()
    assert forward == 2 * (2 * 2 * 3 * 10 * 10 * 4)
    with flop_counter() as counter:
        output.sum().backward()
    assert counter.get_total_flops() == forward * 5 / 2


def test_memory_is_the_most_that_is_held_at_once() -> None:
    def step() -> torch.Tensor:
        a = torch.ones(1000)
        b = a * 2  # 8,000 bytes held
        del a
        b += 1  # in place
        view = b[:10]
        c = torch.cat([b, b])  # 4,000 + 8,000
        del b, view
        return c.sum()

    assert 12000 <= peak_bytes(step) < 12100
    weight = torch.ones(500, 500, requires_grad=True)
    weight.grad = torch.zeros(500, 500)
    assert peak_bytes(lambda: (weight * weight).sum().backward()) >= 2 * 10**6  # gradients of both factors


def test_memory_that_was_there_before_does_not_count() -> None:
    there = torch.ones(10**6)
    assert peak_bytes(lambda: there[:10] + 1) < 100
