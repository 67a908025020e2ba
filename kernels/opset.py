"""What an op set is: the few semantic operations that every network is written against.

What travels between the operations is opaque to the network: an op set may store it in any layout
and precision, or leave a pending normalisation to the consumer. Parameters and images are plain
tensors, or values of a graph where the layers only describe what is to be computed.

Every tensor has a leading fit axis F: F independent fits run side by side, each with its own
weights. Statistics are taken over (H, W) only: batch normalisation over a batch of one.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

Pad = Literal["reflection", "zero"]
Activation = Literal["LeakyReLU", "Swish", "ELU", "none"]
Down = Literal["stride", "avg", "max", "lanczos2", "lanczos3"]
Up = Literal["nearest", "bilinear"]

EPS = 1e-5  # added to the variance, as in torch.nn.BatchNorm2d
SLOPE = 0.2  # of the published LeakyReLU

A = TypeVar("A")
P = TypeVar("P")


class Layers(Protocol[A, P]):
    """The operations that a network consists of.

    `A` is what an op set passes between them, `P` what parameters and images are.
    """

    def conv_norm_act(
        self,
        x: A,
        weight: P,
        bias: P | None,
        gamma: P,
        beta: P,
        *,
        stride: int = 1,
        down: Down = "stride",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> A:
        """Convolve, normalise each channel over (H, W), activate.

        Args:
            weight: [F, O, I, k, k], k odd.
            bias: [F, O] or None. A norm follows: it has no effect on the result.
            gamma: Scale of the norm, [F, O].
            beta: Shift of the norm, [F, O].
            stride: 1, or 2 to halve the resolution (rounded up; down, where `down` pools).
            down: How a stride of 2 is taken: by the convolution, or by pooling its full output.
        """
        ...

    def join_conv(
        self,
        skip: A | None,
        deep: A,
        join_gamma: P,
        join_beta: P,
        weight: P,
        bias: P | None,
        gamma: P,
        beta: P,
        *,
        up: Up = "bilinear",
        pad: Pad = "reflection",
        act: Activation = "LeakyReLU",
    ) -> A:
        """Enlarge `deep` twofold, put it behind `skip`, normalise; convolve, normalise, activate.

        Where their sizes differ both are cropped centrally to the smaller one. Without `skip`
        nothing is cropped. `join_gamma` and `join_beta` are [F, Cs + Cd], `weight` is [F, O, Cs +
        Cd, k, k].
        """
        ...

    def head(
        self,
        x: A,
        weight: P,
        bias: P | None,
        *,
        pad: Pad = "reflection",
        sigmoid: bool = True,
    ) -> P:
        """Draw the image, [F, C, H, W], in float32 at least, in [0, 1] if `sigmoid`."""
        ...


class OpSet(Layers[A, Tensor], Protocol[A]):
    """All operations of a fitting step: around the layers, its input and its update."""

    def perturb(
        self, z: Tensor, table: Tensor, offsets: Sequence[int], std: float, dtype: torch.dtype
    ) -> A:
        """Add the step's noise to the network's input.

        out[f, c, y, x] = z[f, c, y, x] + std * table[(offsets[f] + (y * W + x) * C + c) mod
        len(table)]

        Args:
            z: Network input, [F, C, H, W].
            table: Draws from a normal distribution, [T]; see `flashdip.kernels.noise`.
            offsets: Where each fit starts to read, F integers in [0, T).
            std: Standard deviation of the noise; 0 adds none.
            dtype: What activations are stored in from here on.
        """
        ...

    def adam(
        self,
        parameters: Tensor,
        gradients: Tensor,
        moment1: Tensor,
        moment2: Tensor,
        *,
        step: int,
        rate: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Update parameters and moments in place, all [F, P] (Kingma and Ba, 2015).

        Args:
            step: Of the bias correction, from 1.
            rate: Learning rate.
            betas: Decay of the first and second moment.
            eps: Added to the root of the corrected second moment.
        """
        ...
