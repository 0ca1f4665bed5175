"""Muon: orthogonal steps, what it leaves to AdamW, and that it learns faster."""

import pytest
import torch

from deft_med.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_orthogonalised_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    gradient = u * torch.logspace(0, -1.5, len(v)) @ v
    found = u.T @ orthogonalised(gradient) @ v.T
    values = found.diagonal()
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    assert float((found - values.diag()).abs().max()) < 1e-3


def test_vectors_linear_layers_and_named_ends_move_as_adamw_moves_them() -> None:
    def layers() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))

    mine, theirs = layers(), layers()
    optimisers = (Muon(mine.parameters(), 1e-2, weight_decay=0.1, plain=[mine[0].weight]),
                  torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1, betas=(0.9, 0.99)))
    for seed in range(4):
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        for module, optimiser in zip((mine, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_a_convolution_moves_by_an_orthogonal_step_of_the_stated_length() -> None:
    layer = torch.nn.Conv2d(4, 16, 1, bias=False)
    before, optimiser = layer.weight.detach().clone(), Muon(layer.parameters(), 1e-3, weight_decay=0.0)
    layer(torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimiser.step()
    values = torch.linalg.svdvals((layer.weight - before).detach().flatten(1)) / (10 * 1e-3 * 2)  # 2: sqrt(16 / 4)
    assert 0.5 < float(values.min()) and float(values.max()) < 1.3
