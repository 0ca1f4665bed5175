"""Muon: orthogonal steps for the weights that mix channels, AdamW's for the rest.

torch's own Muon takes two-dimensional weights alone; here those of convolutions count as matrices, outputs x (inputs x taps).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the quintic that drives all singular values towards 1: Jordan et al. 2024
TURNS = 5
MOMENTUM = 0.95
BETAS, EPS = (0.9, 0.99), 1e-8
FACTOR = 10.0  # learning rate of matrices over that of the rest


def orthogonalised(gradient: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (semi-)orthogonal matrix nearest to a (rows, columns) one, about: singular values 0.7 to 1.2, by Newton-Schulz in ``dtype``."""
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = (x / (x.norm() + 1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(TURNS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).to(gradient.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for convolutions, AdamW for vectors, linear layers and the parameters in ``plain``: first and last layers.

    A matrix moves by 10 lr sqrt(max(1, rows / columns)) along its orthogonalised Nesterov momentum, everything else by AdamW at lr.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 1e-4, plain: Iterable[nn.Parameter] = (),
                 dtype: torch.dtype = torch.float32) -> None:
        given, kept = list(parameters), {id(p) for p in plain}
        self.matrices, self.dtype = {id(p) for p in given if p.ndim >= 4 and id(p) not in kept}, dtype
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if id(p) in self.matrices:
                    self._matrix(p, p.grad, group["lr"])
                else:
                    self._vector(p, p.grad, group["lr"])

    def _matrix(self, p: nn.Parameter, gradient: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        ahead = torch.lerp(gradient, state["exp_avg"], MOMENTUM).flatten(1)
        rows, columns = ahead.shape
        p.add_(orthogonalised(ahead, self.dtype).reshape(p.shape), alpha=-FACTOR * lr * max(1.0, rows / columns) ** 0.5)

    def _vector(self, p: nn.Parameter, gradient: Tensor, lr: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - BETAS[0])
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = (state[key] / (1 - beta ** float(state["step"])) for key, beta in zip(("exp_avg", "exp_avg_sq"), BETAS, strict=True))
        p.addcdiv_(mean, square.sqrt() + EPS, value=-lr)
