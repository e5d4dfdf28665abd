"""Rotations of a model's residual stream, as matrices that are cheap to apply.

With an orthogonal ``Q`` the hidden states ``h`` become ``h Q``. A linear that reads them has
``W Q`` for its ``W``, one that writes them ``Q^T W`` and ``b Q`` for its bias, an embedding
``E Q``: the model computes what it did. A Hadamard matrix spreads every outlier evenly over all
channels (QuaRot, arXiv:2404.00456, section 3; the ``++`` of MoEQuant, arXiv:2505.03804).

``Q = diag(signs) (left kron right)`` with factors of about ``sqrt(size)``, so that rotating a row
takes ``size (a + b)`` multiplications and not ``size^2``, and ``Q`` itself is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.linalg import hadamard  # type: ignore[import-untyped]

_ROWS = 4096  # rotated at a time: float64 copies of an embedding would not fit


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``diag(signs) (left kron right)``.

    Attributes:
        signs: ``[a * b]`` float64 of 1 and -1.
        left: ``[a, a]`` float64, orthogonal.
        right: ``[b, b]`` float64, orthogonal.
    """

    signs: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @property
    def size(self) -> int:
        """Return the number of channels that are rotated."""
        return len(self.signs)

    def to(self, device: torch.device) -> Rotation:
        """Return the rotation on a device, which has to know float64."""
        return Rotation(self.signs.to(device), self.left.to(device), self.right.to(device))

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ Q`` in float64.

        Args:
            rows: ``[n, size]``, any float dtype; ``n`` may be 0.
        """
        blocks = (rows.double() * self.signs).unflatten(-1, (len(self.left), len(self.right)))
        rotated: torch.Tensor = self.left.T @ blocks @ self.right
        return rotated.flatten(-2)

    def of_reader(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of a linear that reads rotated hidden states, ``W diag(scale) Q``.

        Computed in float64 on the rotation's device, some rows at a time.

        Args:
            weight: ``[out, size]`` of a linear, or ``[vocabulary, size]`` of an embedding, whose
                rows *are* hidden states.
            scale: ``[size]``, the weight of the norm before the linear; ``None`` means 1.

        Returns:
            ``[out, size]`` in the weight's dtype and on its device.
        """
        rotated = torch.empty_like(weight, memory_format=torch.contiguous_format)
        factor = 1.0 if scale is None else scale.to(self.signs)
        for old, new in zip(weight.split(_ROWS), rotated.split(_ROWS), strict=True):
            new.copy_(self.apply(old.to(self.signs) * factor))
        return rotated

    def of_writer(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight of a linear that writes rotated hidden states, ``Q^T W``.

        Args:
            weight: ``[size, in]``; its columns are hidden states.
        """
        return self.of_reader(weight.T).T.contiguous()

    def of_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Return the bias ``[size]`` of a linear that writes rotated hidden states, ``b Q``."""
        return self.of_reader(bias[None])[0]


def random_rotation(
    size: int, *, seed: int, hadamard_of: Callable[[int], torch.Tensor | None]
) -> Rotation:
    """Return a random Hadamard rotation, the closest thing to it where none of that size is known.

    The signs are random, the factors are Hadamard matrices: a power of two as near to
    ``sqrt(size)`` as leaves a known order. Where there is none, ``right`` is a random orthogonal
    matrix of the odd part of ``size``, which spreads outliers nearly as well.

    Args:
        size: of the residual stream, at least 1.
        seed: of the signs and, where needed, of the orthogonal matrix.
        hadamard_of: returns a Hadamard matrix of an order, of entries 1 and -1, or ``None``.

    Example:
        >>> rotation = random_rotation(8, seed=0, hadamard_of=lambda order: None)
        >>> q = rotation.apply(torch.eye(8))
        >>> bool(torch.allclose(q @ q.T, torch.eye(8).double())), float(q.abs().max())
        (True, 0.35...)
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    power = size & -size  # the largest power of two that divides it
    left = 1 << min(math.isqrt(size).bit_length() - 1, power.bit_length() - 1)
    while left:
        right = hadamard_of(size // left)
        if right is not None:
            return Rotation(signs, _power_of_two(left), _normalized(right))
        left //= 2
    gaussian = torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)
    return Rotation(signs, _power_of_two(power), torch.linalg.qr(gaussian).Q)


def _power_of_two(order: int) -> torch.Tensor:
    return _normalized(torch.from_numpy(hadamard(order)))


def _normalized(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.double() / math.sqrt(len(matrix))
