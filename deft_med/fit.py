"""fit(): the one training loop, over tensors. Needs torch, numpy and safetensors only, so that it runs on any GPU machine.

The batch of step i is a function of (seed, i) alone, and a checkpoint holds weights, their average, the optimiser's moments and
the step: a training that was killed goes on to the same curve.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from deft_med.muon import Muon
from deft_med.network import bf16_pays


@dataclass(frozen=True)
class Stage:
    """Part of a training: ``steps`` batches of ``batch`` images of ``size`` x ``size`` pixels, with noise up to ``highest``.

    A first stage of low noise only teaches a network to tell noise from detail; with all levels at once it looks at shapes first,
    and may stay there for thousands of steps.
    """

    steps: int
    size: int
    batch: int
    highest: float = 80.0


@dataclass(frozen=True)
class Recipe:
    """How to train, apart from what: stages, optimiser (adamw or muon), learning rate (cosine to zero after a warm-up), averaging,
    clipping, seed."""

    stages: tuple[Stage, ...]
    lr: float = 1e-3
    optimiser: str = "adamw"
    warmup: int = 100
    weight_decay: float = 1e-4
    ema: float = 0.998
    clip: float = 1.0
    seed: int = 0
    validate_every: int = 500
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.optimiser not in ("adamw", "muon"):
            raise ValueError(f"optimiser is adamw or muon, got {self.optimiser!r}")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine to zero."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def step_generator(seed: int, step: int, device: torch.device | str) -> Generator:
    """The generator of one step: the same draws whenever that step is run."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)  # the CPU generator looks at 32 bits only
    return Generator(device=device).manual_seed(int(state[0]))


def fit(network: nn.Module, objective: Callable[[Generator, Stage], Tensor], recipe: Recipe, out: Path, *,
        validate: Callable[[], dict[str, float]] | None = None, resume: bool = False, device: str | torch.device = "cpu",
        log: Callable[[dict], None] | None = None, seconds: float = math.inf) -> dict[str, Tensor]:
    """Train ``network`` on ``objective(generator, stage) -> (B,)`` losses; returns the averaged weights that validated best.

    ``validate()`` is called with the averaged weights in place and returns named errors; the key ``score`` (lower is better)
    chooses the weights, else the last ones are taken. Writes ``state.safetensors`` (to resume), ``best.safetensors`` (float32
    averaged weights) and ``log.jsonl`` into ``out``. Stops early, resumable, after ``seconds``.
    Raises FileExistsError when ``out`` holds a training and ``resume`` is false; ValueError when the state is another network's.
    """
    out = Path(out)
    state, best, records = out / "state.safetensors", out / "best.safetensors", out / "log.jsonl"
    if state.exists() and not resume:
        raise FileExistsError(f"{out.name} holds a training already: resume it (--resume) or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in weights.items()}
    optimiser = _optimiser(weights, recipe, device)
    step, lowest = 0, math.inf
    if resume and state.exists():
        step, lowest = _restore(state, weights, average, optimiser)
        _trim(records, step)
    begun, first, total, seen = time.monotonic(), step, 0.0, 0
    while step < recipe.steps:
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        stage = recipe.stage(step)
        network.train()
        loss = objective(step_generator(recipe.seed, step, device), stage).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
        if torch.isfinite(norm):
            optimiser.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in weights.items():
                average[name].lerp_(p, 1 - decay)
        step += 1
        total, seen = total + float(loss.detach()), seen + 1
        end = step == recipe.steps or time.monotonic() - begun > seconds
        if end or step % recipe.validate_every == 0 or step % recipe.save_every == 0:
            spent = time.monotonic() - begun
            record: dict = {"step": step, "loss": total / seen, "rate": recipe.rate(step - 1), "seconds": spent,
                            "eta": spent / (step - first) * (recipe.steps - step)}
            total, seen = 0.0, 0
            if validate is not None and (end or step % recipe.validate_every == 0):
                with _installed(network, weights, average):
                    record |= validate()
            score = record.get("score", -step if validate is None else math.inf)
            if score < lowest:
                lowest = score
                _save(best, average, {"step": str(step), "score": repr(score)})
            _save(state, _pack(weights, average, optimiser), {"step": str(step), "lowest": repr(lowest)})
            with records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if log is not None:
                log(record)
        if end:
            break
    with safe_open(best, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _optimiser(weights: dict[str, nn.Parameter], recipe: Recipe, device: str | torch.device) -> torch.optim.Optimizer:
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(weights.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99))
    ends = [p for name, p in weights.items() if "inlet" in name or "outlet" in name]
    dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    return Muon(weights.values(), lr=recipe.lr, weight_decay=recipe.weight_decay, plain=ends, dtype=dtype)


class _installed:
    """Averaged weights in place of the trained ones, for as long as the context lasts."""

    def __init__(self, network: nn.Module, weights: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self.network, self.weights, self.average = network, weights, average

    def _swap(self) -> None:
        with torch.no_grad():
            for name, p in self.weights.items():
                kept = p.detach().clone()
                p.copy_(self.average[name])
                self.average[name] = kept

    def __enter__(self) -> None:
        self.network.eval()
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        self.network.train()


def _moments(weights: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    for name, p in weights.items():
        for key, value in optimiser.state[p].items():
            yield name, key, value


def _pack(weights: dict[str, nn.Parameter], average: dict[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    packed = {f"weight/{n}": p.detach() for n, p in weights.items()} | {f"average/{n}": a for n, a in average.items()}
    return packed | {f"moment/{key}/{name}": value for name, key, value in _moments(weights, optimiser)}


def _restore(path: Path, weights: dict[str, nn.Parameter], average: dict[str, Tensor],
             optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    with safe_open(path, "pt") as file, torch.no_grad():
        names = set(file.keys())
        if {n.removeprefix("weight/") for n in names if n.startswith("weight/")} != set(weights):
            raise ValueError(f"{path.name} is the state of another network: train into a new folder")
        for name, p in weights.items():
            p.copy_(file.get_tensor(f"weight/{name}"))
            average[name].copy_(file.get_tensor(f"average/{name}"))
            moments = {key: f"moment/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[p] = {key: file.get_tensor(full).to("cpu" if key == "step" else p.device)
                                  for key, full in moments.items() if full in names}
        meta = file.metadata()
    return int(meta["step"]), float(meta["lowest"])


def _trim(records: Path, step: int) -> None:
    """Forget log lines behind the checkpoint: those steps are run again."""
    lines = [line for line in records.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
    records.write_text("".join(line + "\n" for line in lines), "utf-8")


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Safetensors written beside, flushed to disk, then renamed: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.part")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, beside, metadata=metadata)
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
