"""Methods by name: what a benchmark's method says, without running it.

A method is NAME[:WORD...][:SETTING=VALUE...]. Without a network fbp:WINDOW:cutoff=C, tv, wavelet and cg-sense with weight=W and the
other classical methods of a problem; networks trained on pairs supervised:DIR, conditional:DIR; samplers on the model's prior deft,
`guidance.METHODS` and, where installed, `peers.PEERS`. Of samplers, conditional ones included, a WORD is a number of samples to average,
"sample" for one or, where one evaluation at the highest noise level answers, "mean"; they know the setting steps. ``deft+dc`` takes four
steps of data consistency, ``deft-dc`` and conditional none, deft what the card says or ``consistency``; eta, trust and mirrored replace
the card's too, and with zeta (1: all of it) the noise is drawn anew at every level, for averages that need fewer images
(`pipeline.draw_posterior`). deft-online trains its own h on the measurement, one weight of the residual per noise level, in so many
``iterations`` at a ``rate``, and draws one sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from deft_med import guidance, peers
from deft_med.errors import UsageError
from deft_med.finetune import ITERATIONS, online_evaluations
from deft_med.pipeline import POINT_STEPS, STEPS

GUIDED = {**guidance.METHODS, **peers.PEERS}
CONSISTENCY = {"deft": None, "deft-dc": 0, "deft+dc": 4, "conditional": 0}  # steps of it; None: what the card says
TRAINED = ("supervised", "conditional")
POSTERIOR = tuple(CONSISTENCY)  # their samples start around a posterior mean that they share
CLASSICAL = {"fbp": ("cutoff",), "tv": ("weight",), "zero-filled": (), "cg-sense": ("weight",), "wavelet": ("weight",),
             "interpolation": (), "projections": ()}  # fmt: skip
ONLINE = {"iterations": float(ITERATIONS), "rate": 0.1}  # of deft-online
SLOW = 200  # evaluations of a sample


@dataclass(frozen=True)
class Entry:
    """A method as it was typed, and what that says; ``count`` None leaves the number of samples open, 0 stands for "mean"."""

    text: str
    name: str
    folder: str = ""
    words: tuple[str, ...] = ()
    count: int | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> bool:
        """Whether it is a sampler."""
        return self.name in GUIDED or self.name in POSTERIOR or self.name == "deft-online"

    @property
    def steps(self) -> int:
        """Evaluations of a sample; 0 where there is no sampling."""
        if self.name == "deft-online":
            return online_evaluations(int(self.settings.get("iterations", ONLINE["iterations"])))
        drawn = 0 if not self.samples else POINT_STEPS if "zeta" in self.settings else STEPS
        return int(self.settings.get("steps", GUIDED[self.name].steps if self.name in GUIDED else drawn))

    @property
    def slow(self) -> bool:
        """More than 200 evaluations a sample, or backpropagation through the prior."""
        return self.steps > SLOW or self.through_prior

    @property
    def through_prior(self) -> bool:
        """Whether it goes back through the prior for a gradient."""
        return self.name == "deft-online" or self.name in GUIDED and GUIDED[self.name].through_prior

    def like(self, count: int | None, settings: Mapping[str, float]) -> str:
        """The text of the same method with another count and further settings."""
        word = {None: [], 0: ["mean"], 1: ["sample"]}.get(count, [str(count)])
        values = [f"{key}={value:.4g}" for key, value in {**self.settings, **settings}.items()]
        return ":".join([self.name, *filter(None, [self.folder]), *self.words, *word, *values])


def parse(text: str) -> Entry:
    """What a method's text says. Raises UsageError for an unknown method, word or setting."""
    name, *parts = text.strip().split(":")
    if name not in {*CLASSICAL, *TRAINED, *CONSISTENCY, *GUIDED, "deft-online"}:
        raise UsageError(f"unknown method {text!r}: python -m deft_med.benchmark --help lists them")
    folder = parts.pop(0) if name in TRAINED and parts else ""
    if name in TRAINED and not folder:
        raise UsageError(f"method {name} wants the folder of a training: {name}:DIR")
    known = {"steps", "eta", "zeta", "trust", "mirrored", "consistency"} if name in POSTERIOR else set(CLASSICAL.get(name, ()))
    if name in GUIDED:
        known = {"steps", *GUIDED[name].settings, *GUIDED[name].walk}
    if name == "deft-online":
        known = set(ONLINE)
    settings: dict[str, float] = {}
    words, count = [], None
    for part in filter(None, parts):
        key, is_setting, value = part.partition("=")
        if not is_setting and CLASSICAL.get(name) and _number(part) is not None:
            key, is_setting, value = next(iter(known)), "=", part  # tv:3 and fbp:hann:0.7
        if is_setting:
            if key not in known or _number(value) is None:
                raise UsageError(f"method {text}: no setting {part!r} (known are {', '.join(sorted(known)) or 'none'}, each a number)")
            settings[key] = float(value)
        elif name == "deft-online":
            if part not in ("sample", "1"):
                raise UsageError(f"method {text}: deft-online trains for one sample, and has no mean in one evaluation: say deft-online")
            count = 1
        elif name in GUIDED or name in POSTERIOR:
            if part == "mean" and name in POSTERIOR:
                count = 0
            elif part == "sample" or part.isdigit() and int(part) > 0:
                count = 1 if part == "sample" else int(part)
            else:
                raise UsageError(f"method {text}: {part!r} is no number of samples")
        elif name == "fbp":
            words.append(part)
        else:
            raise UsageError(f"method {text}: {name} knows no {part!r}")
    if settings.get("iterations", 1) < 1:
        raise UsageError(f"method {text}: wants 1 iteration or more")
    if settings.get("steps", 2) < 2:
        raise UsageError(f"method {text}: wants 2 steps or more; deft:mean takes one")
    return Entry(text.strip(), name, folder, tuple(words), count, settings)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
