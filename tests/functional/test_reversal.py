import math

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from crossft.functional import adversarial_strength, reverse_gradient


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.5, 0.986614298), (1.0, 0.999909204)])
def test_published_schedule(progress: float, expected: float) -> None:
    assert adversarial_strength(progress) == pytest.approx(expected, abs=1e-8)
    assert adversarial_strength(progress) == pytest.approx(math.tanh(5 * progress), abs=1e-12)


def test_gradient_is_reversed_and_scaled() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.allclose(x.grad, -0.3 * 2 * x)


def test_gradcheck_of_one_and_two_reversals() -> None:
    """Two reversals of strength 1 are the identity, whose numeric gradient is the analytic one; one is not."""
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda t: reverse_gradient(t.sin(), 1.0), (x,))
    assert torch.autograd.gradcheck(lambda t: reverse_gradient(reverse_gradient(t.sin(), 1.0), 1.0), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    reverse_gradient(x, 0.5).sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.full((3,), -0.5, dtype=dtype))
