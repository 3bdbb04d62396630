"""On a GPU: mechanisms over the scan and over patterns against their oracles, by every kernel.

`pytest -m gpu tests/gpu -p no:cacheprovider`; run nowhere yet.
"""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor

from longspan.engines import backends
from longspan.registry import show
from longspan.testing.oracles import oracle_of
from longspan.testing.subject import Subject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SCANS = ["linear-transformer", "efficient-attention"]
PATTERNS = ["bigbird", "longformer", "sparse-transformer", "logsparse-transformer", "nat"]
# ‖error‖ / ‖truth‖: of three TF32 products; of bfloat16 operands.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """dynamo, which flex_attention traces with, cannot pass through the checks of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kernel", ["auto", "fla", "plain"])
@pytest.mark.parametrize("id", SCANS + PATTERNS)
def test_equals_its_oracle_on_a_gpu(id: str, kernel: str, dtype: torch.dtype) -> None:
    if kernel == "fla":
        pytest.importorskip("fla")
    card = show(id)
    causal = "causal" in card.modes
    exact = Subject.of(card, causal=causal)
    subject = Subject.of(card, causal=causal, dtype=dtype)
    exact.module.load_state_dict(
        {
            n: t.double() if t.is_floating_point() else t
            for n, t in subject.module.state_dict().items()
        }
    )
    subject.module.cuda()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, 300, 16, generator=generator).to(dtype) for _ in range(3)]
    truth_in = [t.double().requires_grad_() for t in given]
    cuda_in = [t.cuda().requires_grad_() for t in given]
    oracle = oracle_of(id)
    assert oracle is not None
    truth = oracle(exact.module, *truth_in, keep=None)
    if kernel == "auto":
        got = subject.module(*cuda_in)[0]
    else:
        with backends.use(kernel):
            got = subject.module(*cuda_in)[0]
    toward = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    truth.backward(toward)
    got.backward(toward.to(got))
    near(got, truth, BOUNDS[dtype])
    for a, b in zip(cuda_in, truth_in, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        near(a.grad, b.grad, 2 * BOUNDS[dtype])


def near(got: Tensor, truth: Tensor, bound: float) -> None:
    error = (got.detach().cpu().double() - truth.detach()).norm() / truth.detach().norm()
    assert error <= bound, f"relative error {error:.1e} passes {bound:.0e}"
