"""muon.py: the orthogonal factor against a singular value decomposition, and the update against the
formula by hand."""

import pytest
import torch

from muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 40, 80), (2, 80, 40), (1, 32, 32), (1, 1, 7)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape):
    """Guards against an iteration that diverges, turns the vectors, or forgets to transpose a tall
    matrix back."""
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    levelled = u.mT @ result @ v.mT
    values = levelled.diagonal(dim1=1, dim2=2)
    assert result.shape == matrices.shape
    assert ((values > 0.65) & (values < 1.25)).all()
    torch.testing.assert_close(levelled, torch.diag_embed(values), atol=1e-9, rtol=0)


def test_orthogonal_does_not_depend_on_scale_or_batch():
    """Guards against tiny gradients that are left tiny (late in training they all are), and
    neighbours that leak."""
    matrices = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        orthogonal(1e-6 * matrices), orthogonal(matrices), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        orthogonal(matrices[1:2]), orthogonal(matrices)[1:2], atol=1e-5, rtol=1e-5
    )
    assert torch.equal(
        orthogonal(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4)
    )  # no gradient yet: no NaN either


def test_two_steps_by_hand():
    """Guards against a wrong look-ahead, momentum that is scaled twice, decay that is applied to
    the update, and matrices of one shape that are given each other's updates."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(6, 8), (6, 8), (8, 6)]
    starts, *gradients = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)
    )
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = Muon(weights, lr=0.1, weight_decay=0.5, momentum=0.9)
    momenta = [torch.zeros_like(start) for start in starts]
    expected = starts
    for step in gradients:
        for weight, gradient in zip(weights, step):
            weight.grad = gradient.clone()
        optimizer.step()
        momenta = [0.9 * momentum + 0.1 * gradient for momentum, gradient in zip(momenta, step)]
        for i, (momentum, gradient) in enumerate(zip(momenta, step)):
            ahead = 0.1 * gradient + 0.9 * momentum
            expected[i] = (
                expected[i] * (1 - 0.1 * 0.5) - 0.1 * 0.4 * 8**0.5 * orthogonal(ahead[None])[0]
            )
            torch.testing.assert_close(weights[i].detach(), expected[i], atol=1e-5, rtol=1e-5)
            assert torch.equal(weights[i].grad, gradient)  # the gradient is somebody else's


def test_it_agrees_with_torch():
    """Guards against our own mistakes in what torch does in bf16: directions agree as far as bf16
    lets them."""
    start, gradient = (
        torch.randn(32, 48, generator=torch.Generator().manual_seed(s)) for s in (3, 4)
    )
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([ours], lr=0.1).step()
    torch.optim.Muon([theirs], lr=0.2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(ours.detach() - start, theirs.detach() - start, atol=0.02, rtol=0.05)
