"""Where the time goes: seconds per stage of a run, and per part of a denoiser's evaluations."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds per stage; what is still running on a GPU when a stage begins or ends is waited for, so that it counts where it belongs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.seconds = torch.device(device), dict[str, float]()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begun = self._now()
        yield
        self._add(stage, begun)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count for a stage."""
        def call(*arguments: Any) -> Any:
            with self(stage):
                return function(*arguments)

        return call

    @contextmanager
    def within(self, **modules: torch.nn.Module) -> Iterator[None]:
        """While the block runs, the calls of each module count for the stage of its name."""
        begun: dict[str, float] = {}
        hooks = [hook for stage, module in modules.items() for hook in (
            module.register_forward_pre_hook(lambda *_, stage=stage: begun.update({stage: self._now()})),
            module.register_forward_hook(lambda *_, stage=stage: self._add(stage, begun[stage])))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _add(self, stage: str, begun: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - begun


def shares(inner: dict[str, float], total: float) -> dict[str, float]:
    """Seconds of prior, h, operators (what else an evaluation does: residual and data consistency) and rest, of ``total`` in all."""
    prior, h, evaluation = (inner.get(part, 0.0) for part in ("prior", "h", "evaluation"))
    return {"prior": prior, "h": h, "operators": evaluation - prior - h, "rest": total - evaluation}
