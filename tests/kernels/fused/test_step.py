"""Adam and the perturbation against the specification, program by program."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels import noise, reference
from flashdip.kernels.fused import step
from flashdip.kernels.fused.step import BLOCK, Sum
from tests.kernels.fused.judge import Scratch, judge, poisoned

BETAS, EPS = (0.9, 0.999), 1e-8


class _Fit:
    """Two fits, two blocks of parameters: one whose gradient is a sum of parts, one plain."""

    def __init__(self, dtype: torch.dtype, unaligned: int = 0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.parameters = torch.randn(2, 2 * BLOCK, generator=generator)
        self.copies = None if dtype == torch.float32 else poisoned((2, 2 * BLOCK), dtype)
        self.moments = torch.zeros_like(self.parameters), torch.zeros_like(self.parameters)
        self.arena = torch.randn(2 * 13 * BLOCK, generator=generator)
        stride = BLOCK + 16 + unaligned
        self.sums = [
            Sum(8 + unaligned, fits=13 * BLOCK, live=BLOCK - 37),
            Sum(2 * BLOCK, parts=9, stride=stride, fits=13 * BLOCK),
        ]
        self.counters = torch.tensor([0, 0], dtype=torch.int32)
        self.scale = torch.tensor([1.0, 0.5])
        self.rates = [0.01, 0.02, 0.005]
        self.adam = step.adam(
            "adam",
            self.parameters,
            self.copies,
            *self.moments,
            self.arena,
            self.sums,
            step.schedule(self.rates, BETAS),
            self.counters,
            self.scale,
            Scratch(),
            betas=BETAS,
            eps=EPS,
            loss_scale=128.0,
        )

    def gradients(self) -> Tensor:
        """Return the sums that the table asks for, [F, P] float64."""
        return torch.stack([torch.cat([self._sum(s, f) for s in self.sums]) for f in range(2)])

    def _sum(self, s: Sum, f: int) -> Tensor:
        starts = [s.offset + f * s.fits + j * s.stride for j in range(s.parts)]
        total = torch.stack([self.arena[at : at + BLOCK].double() for at in starts]).sum(0)
        total[s.live :] = 0
        return total


@pytest.mark.parametrize(
    ("dtype", "unaligned"),
    [(torch.float16, 0), (torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 3)],
)
def test_adam(dtype: torch.dtype, unaligned: int) -> None:
    """Three steps with other gradients each: equal to the specification in float64, to 1e-6."""
    fit = _Fit(dtype, unaligned)
    exact = [t.double() for t in (fit.parameters, *fit.moments)]
    for t, rate in enumerate(fit.rates, start=1):
        fit.arena.copy_(torch.randn(fit.arena.shape, generator=torch.Generator().manual_seed(t)))
        for f in range(2):
            reference.adam(
                exact[0][f],
                fit.gradients()[f] / 128,
                exact[1][f],
                exact[2][f],
                step=t,
                rate=rate * float(fit.scale[f]),
                betas=BETAS,
                eps=EPS,
            )
        fit.adam()
        assert fit.counters.tolist() == [t, t]
    for actual, truth in zip((fit.parameters, *fit.moments), exact, strict=True):
        scale = float(truth.abs().max())
        torch.testing.assert_close(actual.double(), truth, rtol=1e-6, atol=1e-6 * scale)
    if fit.copies is not None:
        assert torch.equal(fit.copies, fit.parameters.to(dtype))


def test_adam_in_any_order(reversed_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program is last, the bits are the same."""
    mirrored = _Fit(torch.float16)
    mirrored.adam()
    monkeypatch.undo()
    plain = _Fit(torch.float16)
    plain.adam()
    assert torch.equal(mirrored.parameters, plain.parameters)
    assert mirrored.counters.tolist() == plain.counters.tolist() == [1, 1]
    assert not plain.adam.arguments["arrived_ptr"].any()  # type: ignore[union-attr]


def test_fits_are_at_steps_of_their_own() -> None:
    """Each fit has its counter; beyond the schedule its last row serves."""
    fit = _Fit(torch.float32)
    fit.counters.copy_(torch.tensor([1, 7]))
    before = fit.parameters.clone()
    fit.adam()
    assert fit.counters.tolist() == [2, 8]
    rows = step.schedule(fit.rates, BETAS)
    gradients = (fit.gradients() / 128).float()
    for f, (rate, correction) in enumerate((rows[1], rows[2])):
        root = (0.001 * gradients[f] ** 2).sqrt() * correction + EPS
        moved = fit.scale[f] * rate * 0.1 * gradients[f] / root
        torch.testing.assert_close(fit.parameters[f], before[f] - moved, rtol=1e-5, atol=1e-6)


def _near_the_end(values: int) -> int:
    """Return a key that at step 4 reads the table beyond its end."""
    keys = (noise.key(seed) for seed in range(1_000_000))
    return next(k for k in keys if noise.offset(k, 4) > noise.TABLE_SIZE - values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 7, 11, 32), (2, 37, 43, 5), (1, 2, 3, 4)])
def test_perturb(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each fit reads the table from its own place, round its end, at steps of its own."""
    fits, height, width, channels = shape
    z = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    keys = [_near_the_end(height * width * channels // 2), noise.key(3, fit=1, retry=2)][:fits]
    steps = [4, 2999][:fits]
    table = noise.table()
    out = poisoned(shape, dtype)
    step.perturb(
        "perturb",
        z,
        out,
        table.half(),
        torch.tensor(keys),
        torch.tensor(steps, dtype=torch.int32) - 1,
        std=1 / 30,
    )()
    offsets = [noise.offset(key, at) for key, at in zip(keys, steps, strict=True)]
    planes = z.permute(0, 3, 1, 2)
    exact = reference.perturb(planes.double(), table.double(), offsets, 1 / 30, torch.float64)
    rounded = reference.perturb(planes, table, offsets, 1 / 30, dtype)
    judge(out.permute(0, 3, 1, 2), exact, rounded, dtype)
