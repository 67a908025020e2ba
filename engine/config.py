"""How a fit is done; presets are values of `FitConfig`."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import SkipConfig

Input = Literal["noise", "meshgrid"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["auto", "fp16", "bf16", "fp32", "fp64"]
StopRule = Literal["fixed", "es-wmv", "es-emv", "discrepancy", "budget"]


@dataclass(frozen=True)
class FitConfig:
    """Everything that decides the result, beside the problem.

    Attributes:
        network: The network; its number of outputs follows the image.
        input: The network's input z: "noise", uniform in [0, input_scale], or "meshgrid", the two
            coordinates.
        input_scale: Upper end of the uniform noise.
        iterations: The most iterations.
        learning_rate: Of Adam.
        betas: Decay of Adam's first and second moment, each in [0, 1).
        eps: Added to the root of Adam's second moment.
        schedule: "constant", or "cosine": from the learning rate down to a hundredth of it.
        warmup: Iterations over which the rate rises linearly from 0; 0: none.
        perturbation: Standard deviation of the noise added to z anew in each iteration.
        average: Decay of the exponential average of outputs, in [0, 1); None: the output itself is
            returned.
        add_back: Share of the residual that is added back to the image in the end, in [0, 1), where
            pixels themselves were measured: most of what a fit has not drawn is noise, some of it
            detail; see `Problem.finish`.
        stop: Stopping rules, any of which ends the fit: "fixed" (after `iterations`), "es-wmv" and
            "es-emv" (at the least variance of outputs), "discrepancy" (the residual reaches sigma),
            "budget".
        budget: Seconds that the iterations may take, whatever `stop` says; None: no limit.
        window: Outputs in the windowed variance, in iterations. 200 have the same mean age as an
            average of decay 0.99 gives them, so that the variance judges what is returned.
        patience: Iterations without a new least variance, after which es-wmv and es-emv stop.
        discrepancy: Share of sigma, as far as clipping leaves it, that the residual of the averaged
            output has to reach for the rule of that name.
        read_every: Iterations between two readings of the statistics; rules decide at readings
            only.
        retries: How often a diverging fit goes back to its last good state before it ends.
        precision: Storage of activations: "fp16" (triton only), "bf16", "fp32", "fp64" (reference
            only), or "auto".
        seed: Of the initial weights, z and the perturbation.
        runs: Fits with seeds from `seed` on, whose images are averaged.
    """

    network: SkipConfig = field(default_factory=SkipConfig)
    input: Input = "noise"
    input_scale: float = 0.1
    iterations: int = 3000
    learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Schedule = "constant"
    warmup: int = 0
    perturbation: float = 1 / 30
    average: float | None = 0.99
    add_back: float = 0.0
    stop: tuple[StopRule, ...] = ("fixed",)
    budget: float | None = None
    window: int = 200
    patience: int = 500
    discrepancy: float = 1.0
    read_every: int = 10
    retries: int = 5
    precision: Precision = "auto"
    seed: int = 0
    runs: int = 1

    def __post_init__(self) -> None:
        for name in ("iterations", "window", "patience", "read_every", "runs"):
            _whole(name, getattr(self, name), 1)
        for name in ("retries", "seed", "warmup"):
            _whole(name, getattr(self, name), 0)
        if self.seed >= 1 << 62:
            raise ConfigError(f"seed: expected a whole number below 2^62, got {self.seed}")
        for name in ("input_scale", "learning_rate", "perturbation", "discrepancy"):
            _number(name, getattr(self, name), 0.0, 1000.0)
        _number("eps", self.eps, 1e-30, 1.0)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ConfigError(f"betas: expected two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            _number("betas", beta, 0.0, 1.0)
        if self.average is not None:
            _number("average", self.average, 0.0, 1.0)
        _number("add_back", self.add_back, 0.0, 1.0)
        if self.budget is not None:
            _number("budget", self.budget, 0.0, math.inf)
        _choice("input", self.input, get_args(Input))
        _choice("schedule", self.schedule, get_args(Schedule))
        _choice("precision", self.precision, get_args(Precision))
        if not self.stop:
            raise ConfigError("stop: expected at least one rule, got none")
        for rule in self.stop:
            _choice("stop", rule, get_args(StopRule))
        if "budget" in self.stop and self.budget is None:
            raise ConfigError("stop: the rule budget needs a number of seconds, give budget too")
        if self.input == "meshgrid" and self.network.inputs != 2:
            raise ConfigError(
                f"network.inputs: a meshgrid has 2 channels, got {self.network.inputs}; set it to 2"
            )

    def override(self, settings: Mapping[str, str]) -> "FitConfig":
        """Return the config with fields set from text: {"average": "none", "network.skip": "4"}.

        Numbers, comma lists, true, false and none are understood; fields of the network have a
        prefix.

        Raises:
            ConfigError: A field is unknown, or its value is outside its range.
        """
        own: dict[str, Any] = {}
        network: dict[str, Any] = {}
        for name, text in settings.items():
            target, key, into = (
                (self.network, name.removeprefix("network."), network)
                if name.startswith("network.")
                else (self, name, own)
            )
            known = {f.name: f for f in dataclasses.fields(target)}
            if name == "network.outputs":
                raise ConfigError("network.outputs: it follows the image's channels; leave it out")
            if key not in known or key == "network":
                names = [f.name for f in dataclasses.fields(self) if f.name != "network"]
                names += [f"network.{f.name}" for f in dataclasses.fields(self.network)]
                raise ConfigError(f"{name}: no such field; expected one of {', '.join(names)}")
            value = _parse(text)
            listed = str(known[key].type).startswith("tuple")
            if listed and value is not None and not isinstance(value, tuple):
                value = (value,)
            into[key] = value
        if network:
            own["network"] = dataclasses.replace(self.network, **network)
        return dataclasses.replace(self, **own)

    def rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 1."""
        rate = self.learning_rate * min(1.0, iteration / (self.warmup + 1))
        if self.schedule == "constant":
            return rate
        wave = (1 + math.cos(math.pi * (iteration - 1) / self.iterations)) / 2
        return rate * (0.01 + 0.99 * wave)

    def record(self) -> dict[str, Any]:
        """Return all fields as plain values for JSON; `from_record` is the inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "FitConfig":
        """Build the config from what `record` returned, lists instead of tuples allowed."""
        fields = {key: _freeze(value) for key, value in record.items()}
        network = {key: _freeze(value) for key, value in record["network"].items()}
        return cls(**{**fields, "network": SkipConfig(**network)})


def _parse(text: str) -> Any:
    text = text.strip()
    if "," in text:
        return tuple(_parse(part) for part in text.split(",") if part.strip())
    named = {"none": None, "true": True, "false": False}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list) else value


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}: expected a whole number of at least {least}, got {value!r}")


def _number(name: str, value: object, least: float, end: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < end:  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a number in [{least:g}, {end:g}), got {value!r}")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
