"""What is to be restored: the measurement, how it came about, and what is known beside it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.operators import Identity

SMALLEST_SIDE = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """An inverse problem: find the image x whose measurement `operator(x)` is the observation.

    The fit minimises mean((operator(x) - observation)^2) over all entries, for each fit of the
    leading axis.

    Attributes:
        observation: What was measured, float32, [F, ...]; for images [F, C, H, W] in [0, 1].
            Entries that were not measured are 0, and so must the operator's output be there.
        shape: Channels, height and width of the image that is sought; each side at least 16.
        operator: Takes [F, C, H, W] to a tensor like the observation; any differentiable callable.
        sigma: Standard deviation of the noise, in units of the image's range [0, 1]; None: unknown.
        known: Pixels of the image that were measured exactly, 1 or 0, [F or 1, C or 1, H, W]; they
            are pasted into the result from `pasted`.
        pasted: The image to paste the known pixels from, [F, C, H, W]; None: the observation.
    """

    observation: Tensor
    shape: tuple[int, int, int]
    operator: Callable[[Tensor], Tensor] = field(default_factory=Identity)
    sigma: float | None = None
    known: Tensor | None = None
    pasted: Tensor | None = None

    def __post_init__(self) -> None:
        channels, height, width = self.shape
        if min(height, width) < SMALLEST_SIDE or channels < 1:
            raise ShapeError(
                f"image: expected at least one channel and sides of at least {SMALLEST_SIDE} "
                f"pixels, got {channels} channels, {width}x{height}"
            )
        if not torch.isfinite(self.observation).all():
            raise InputError(
                "observation: expected finite numbers, got NaN or infinity; mark missing pixels "
                "with a mask"
            )
        if self.sigma is not None and not 0 <= self.sigma < float("inf"):
            raise ConfigError(f"sigma: expected a finite number of at least 0, got {self.sigma}")
        image = torch.zeros(self.fits, *self.shape)
        with torch.no_grad():
            measured = self.operator(image)
        if measured.shape != self.observation.shape:
            raise ShapeError(
                f"observation: expected the operator's output shape {tuple(measured.shape)} for an "
                f"image of {width}x{height}, got {tuple(self.observation.shape)}"
            )

    @property
    def fits(self) -> int:
        """Number of independent fits, F."""
        return self.observation.shape[0]

    def paste(self, image: Tensor) -> Tensor:
        """Return the image [F, C, H, W] with the known pixels put back."""
        if self.known is None:
            return image
        source = self.observation if self.pasted is None else self.pasted
        return torch.where(self.known.to(image.device) > 0, source.to(image), image)
