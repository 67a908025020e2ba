"""What is to be restored: the measurement, how it came about, and what is known beside it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.operators import Identity, Mask

SMALLEST_SIDE = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """An inverse problem: find the image x whose measurement `operator(x)` is the observation.

    The fit minimises mean((operator(x) - observation)^2) over all entries, for each fit of the
    leading axis.

    Attributes:
        observation: What was measured, float32, [F, ...]; for images [F, C, H, W] in [0, 1].
        shape: Channels, height and width of the image that is sought; each side at least 16.
        operator: Takes [F, C, H, W] to a tensor like the observation, on its device; any
            differentiable callable. In a fit with precision fp64 it gets float64, else float32.
        sigma: Standard deviation of the noise, in units of the observation; None: unknown.
        measured: Which entries of the observation were measured, 1 or 0, to be broadcast to its
            shape; the others must be 0 there and in the operator's output. None: all.
        known: Pixels of the image that were measured exactly, 1 or 0, [F or 1, C or 1, H, W]; they
            are pasted into the result from `pasted`.
        pasted: The image to paste the known pixels from, [F, C, H, W]; None: the observation.

    Raises:
        InputError: Something is not finite, or shapes do not go together.
    """

    observation: Tensor
    shape: tuple[int, int, int]
    operator: Callable[[Tensor], Tensor] = field(default_factory=Identity)
    sigma: float | None = None
    measured: Tensor | None = None
    known: Tensor | None = None
    pasted: Tensor | None = None

    def __post_init__(self) -> None:
        channels, height, width = self.shape
        if min(height, width) < SMALLEST_SIDE or channels < 1:
            raise ShapeError(
                f"image: expected at least one channel and sides of at least {SMALLEST_SIDE} "
                f"pixels, got {channels} channels, {width}x{height}"
            )
        for name in ("observation", "pasted"):
            tensor = getattr(self, name)
            if tensor is not None and not torch.isfinite(tensor).all():
                raise InputError(
                    f"{name}: expected finite numbers, got NaN or infinity; mark missing pixels "
                    "with a mask"
                )
        if self.sigma is not None and not 0 <= self.sigma < float("inf"):
            raise ConfigError(f"sigma: expected a finite number of at least 0, got {self.sigma}")
        image = torch.zeros(self.fits, *self.shape, device=self.observation.device)
        with torch.no_grad():
            measured = self.operator(image)
        if measured.shape != self.observation.shape:
            raise ShapeError(
                f"observation: expected the operator's output shape {tuple(measured.shape)} for an "
                f"image of {width}x{height}, got {tuple(self.observation.shape)}"
            )
        self._check_fits("measured", self.measured, self.observation.shape)
        if self.measured is not None and not (self.measured > 0).any():
            raise InputError("measured: expected at least one entry that was measured, got none")
        self._check_fits("known", self.known, image.shape)
        if self.known is not None:
            source = self.observation if self.pasted is None else self.pasted
            name = "observation" if self.pasted is None else "pasted"
            if source.shape != image.shape:
                raise ShapeError(
                    f"{name}: expected the image's shape {tuple(image.shape)} to paste known "
                    f"pixels from, got {tuple(source.shape)}; give pasted"
                )

    def _check_fits(self, name: str, mask: Tensor | None, shape: torch.Size) -> None:
        if mask is None:
            return
        try:
            fits = torch.broadcast_shapes(mask.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ShapeError(
                f"{name}: expected a shape that broadcasts to {tuple(shape)}, got "
                f"{tuple(mask.shape)}"
            )

    @property
    def fits(self) -> int:
        """Number of independent fits, F."""
        return self.observation.shape[0]

    @property
    def clipped(self) -> bool:
        """Whether the observation lies in [0, 1] and reaches an end: noise was cut off there."""
        least, most = (float(end) for end in torch.aminmax(self.observation))
        return least >= 0 and most <= 1 and (least == 0 or most == 1)

    def finish(self, image: Tensor, add_back: float) -> Tensor:
        """Return what is made of the image [F, C, H, W] that was drawn.

        A share of the residual is added back to it, which Tukey called twicing ("Exploratory Data
        Analysis", 1977; of a denoiser: Osher et al., "An iterative regularization method", 2005);
        then the known pixels are pasted.

        Args:
            image: As it was drawn.
            add_back: The share, in [0, 1). With other operators than `Identity` and `Mask` the
                residual is none of pixels, and nothing is added back.
        """
        if add_back and isinstance(self.operator, Identity | Mask):
            residual = self.observation.to(image) - self.operator(image)
            if self.measured is not None:
                residual = residual * (self.measured.to(image) > 0)
            image = image + add_back * self.operator.adjoint(residual)
        return self.paste(image)

    def paste(self, image: Tensor) -> Tensor:
        """Return the image [F, C, H, W] with the known pixels put back."""
        if self.known is None:
            return image
        source = self.observation if self.pasted is None else self.pasted
        return torch.where(self.known.to(image.device) > 0, source.to(image), image)
