"""What is counted of a call."""

import torch

from longspan.testing.counting import held


def test_held_is_the_peak_of_what_a_call_makes() -> None:
    x = torch.ones(1000, requires_grad=True)

    def call() -> None:
        for _ in range(3):
            y = x * 2  # 4,000 bytes
            z = (y.view(10, 100) + 1).detach()  # 4,000 more; views add nothing
            del y, z
        torch.ones(10)

    assert held(call) == 8000
    assert held(lambda: (x * 2).sum().backward()) >= 4000  # x.grad stays
    assert held(lambda: x.detach().add_(1)) == 0
