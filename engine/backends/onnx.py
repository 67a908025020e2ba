"""The backend of ONNX Runtime: each iteration is one run of a graph that holds all of it.

The state lies in two places in turns: a run reads one and writes the other, so that nothing is
copied. Where that is a GPU, it is memory of torch's, bound to the graph as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import util
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.backends.hosted import HostedSlot, HostedStep
from flashdip.engine.backends.observe import Observer
from flashdip.engine.backends.probe import state
from flashdip.engine.backends.slots import kept
from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import Skip
from flashdip.engine.onnx.step import TRAINED, write_step
from flashdip.engine.operators import Each, Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise

# What ONNX Runtime takes of what a graph needs at once. With it the memory was 0.90 to 1.13 times
# what a process grew by on a CPU: measured for three presets and sides of 192 to 512 pixels.
ARENA = 2.6
ON_GPU = ("tensorrt", "cuda")  # providers that read and write the GPU's memory


@dataclass
class OnnxBackend:
    """The whole step as an ONNX graph, on any of ONNX Runtime's providers.

    Attributes:
        providers: Names, in order; see `flashdip.engine.onnx.providers`. Empty: that of the device.
    """

    providers: tuple[str, ...] = ()
    name: str = "onnx"
    devices: tuple[str, ...] = ()  # only for those who ask for it

    def unavailable(self, device: torch.device, config: FitConfig) -> list[str]:
        """Return the reasons why this backend cannot run such a fit there; empty if it can."""
        absent = [name for name in ("onnx", "onnxruntime") if util.find_spec(name) is None]
        if absent:
            extra = "onnx-gpu" if device.type == "cuda" else "onnx"
            return [f"{' and '.join(absent)} not installed (pip install 'flashdip[{extra}]')"]
        from flashdip.engine.onnx.providers import PROVIDERS, missing

        known = (name for name in self.providers if name in PROVIDERS)
        reasons = [f"provider {name}: {why}" for name in known if (why := missing(name))]
        if config.precision not in ("auto", "fp32"):
            # Where a provider may round, it rounds Adam's moments too.
            reasons.append(f"it computes in fp32, not {config.precision}")
        if device.type not in ("cpu", "cuda"):
            reasons.append(f"it keeps a fit's state in memory of cpu or cuda, not {device.type}")
        elif self.providers and (device.type == "cuda") != (self.providers[0] in ON_GPU):
            other = "cpu" if device.type == "cuda" else "cuda"
            reasons.append(
                f"the provider {self.providers[0]} works in the memory of {other}, not of "
                f"{device.type} (--device {other})"
            )
        return reasons

    def precision(self, device: torch.device) -> str:
        """Return fp32, the only one."""
        return "fp32"

    def memory(
        self,
        config: FitConfig,
        shape: tuple[int, int, int],
        device: torch.device,
        precision: str,
    ) -> int:
        """Return the bytes that one fit takes: what its graph keeps at once, and both states."""
        from flashdip.engine.onnx.step import kept_bytes

        config = replace(config, network=replace(config.network, outputs=shape[0]))
        return round(ARENA * kept_bytes(config, shape)) + state(config, shape, 4)

    def prepare(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        precision: str,
        truth: Tensor | None,
    ) -> "OnnxStep":
        """Write the graph, open a session, bind the state."""
        providers = self.providers or ("cuda" if device.type == "cuda" else "cpu",)
        return OnnxStep(problem, config, device, truth, providers)


class OnnxStep(HostedStep):
    """One iteration of F fits: F runs of one session. See `Step`.

    Args:
        problem: F fits.
        config: How they are fitted.
        device: In whose memory the state lies.
        truth: The undamaged images, or None.
        providers: Names, in order.

    Raises:
        UnavailableError: A provider is not there, or the operator is a user's own.
        ConfigError: A provider's name is unknown.
    """

    def __init__(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        truth: Tensor | None,
        providers: tuple[str, ...],
    ) -> None:
        from flashdip.engine.onnx.options import Tuning
        from flashdip.engine.onnx.providers import open_session

        self.config, self.device = config, device
        self.network, self.size = Skip(config.network), problem.shape[1:]
        operator = problem.operator
        each = operator.operators if isinstance(operator, Each) else [operator]
        single = next((own for own in each if isinstance(own, Mask)), each[0])  # others are of ones
        model = write_step(config, problem.shape, single).SerializeToString()
        notes: list[str] = []
        tuning = Tuning(device=device.index or 0)
        threads = torch.get_num_threads()
        self.session = open_session(
            model, providers, tuning=tuning, threads=threads, tell=notes.append
        )
        self.notes = tuple(notes)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(problem.fits, *shape, device=device)

        self.watch = Observer(problem, config, device, torch.float32, truth)
        self.z = zeros(config.network.inputs, *config.network.network_size(*self.size))
        self.mask = zeros(*problem.shape) if isinstance(single, Mask) else None
        self.load(operator, slice(None))
        count = sum(torch.Size(p.shape).numel() for p in self.network.parameters)
        state = {name: zeros(count) for name in TRAINED} | {"average": self.watch.average}
        self._sides = [state, {name: torch.zeros_like(tensor) for name, tensor in state.items()}]
        # Numbers of each fit that the host sets before a run; what it does not look at after it.
        self._step, self._key = (torch.zeros(problem.fits, dtype=torch.int64) for _ in range(2))
        self._rate = torch.zeros(problem.fits)
        self._next_step, self._image = (
            torch.zeros_like(t) for t in (self._step, self.watch.output)
        )
        self._bindings = [
            [self._bind(fit, *sides) for fit in range(problem.fits)]
            for sides in (self._sides, self._sides[::-1])
        ]
        self.trained = {name: self._sides[0][name] for name in TRAINED}
        self.good, self.best = kept(self.trained, self.watch, config)
        self.slots = [OnnxSlot(self, fit) for fit in range(problem.fits)]
        for slot in self.slots:
            slot.start(config.seed + slot.index)

    def load(self, operator: Any, fits: slice) -> None:
        """Take over the mask of an operator of these fits, if it is one."""
        if self.mask is not None:
            self.mask[fits] = operator(torch.ones_like(self.mask[fits]))

    def __call__(self) -> None:
        """Advance every fit by one iteration."""
        for fit, slot in enumerate(self.slots):
            self._step[fit] = slot.iteration
            slot.iteration += 1
            self._key[fit] = noise.key(slot.seed, retry=slot.retry)
            self._rate[fit] = self.config.learning_rate * slot.rate_scale
        if self.device.type == "cuda":  # ONNX Runtime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        for binding in self._bindings[0]:
            self.session.run_with_iobinding(binding)
        self._bindings.reverse()
        self._sides.reverse()
        self.trained = {name: self._sides[0][name] for name in TRAINED}
        self.watch.average = self._sides[0]["average"]
        with torch.no_grad():
            self.watch.vary([slot.iteration for slot in self.slots])

    def _bind(self, fit: int, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Any:
        """Bind the memory of a fit: its state is read from one place and written to another."""
        watch = self.watch
        numbers = {"step": self._step, "key": self._key, "rate": self._rate}
        given = {"z": self.z, "observation": watch.observation} | numbers | dict(source)
        if self.mask is not None:
            given["mask"] = self.mask
        made = {f"next_{name}": tensor for name, tensor in target.items()}
        made |= {"next_step": self._next_step, "image": self._image}
        made |= {"output": watch.output, "loss": watch.loss}
        binding = self.session.io_binding()
        for ends, bind, tensors in (
            (self.session.get_inputs(), binding.bind_input, given),
            (self.session.get_outputs(), binding.bind_output, made),
        ):
            for end in ends:
                row = tensors[end.name][fit]
                assert row.is_contiguous() and row.numel() == torch.Size(end.shape).numel()
                bind(
                    end.name,
                    row.device.type,
                    row.device.index or 0,
                    "int64" if row.dtype == torch.int64 else "float32",
                    end.shape,
                    row.data_ptr(),
                )
        return binding


class OnnxSlot(HostedSlot):
    """One fit of an `OnnxStep`."""

    step: OnnxStep

    def replace(self, problem: Problem, seed: int, truth: Tensor | None) -> None:
        """Start another fit in place."""
        self.step.load(problem.operator, slice(self.index, self.index + 1))
        super().replace(problem, seed, truth)
