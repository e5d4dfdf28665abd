"""What follows from tensors is made once and kept until one of them changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Kept(Generic[T]):
    """A value that is made when it is first asked for, and again when its tensors have changed.

    Copies start empty, be they of ``copy.deepcopy`` or of pickle: a value may hold addresses of the
    tensors that it was made of.
    """

    def __init__(self) -> None:
        self._made_of: tuple[Any, ...] | None = None
        self._value: T

    def of(self, make: Callable[[], T], *tensors: torch.Tensor) -> T:
        """Return what ``make`` returns for these tensors as they are."""
        made_of = tuple((t.data_ptr(), _version(t), t.dtype, t.device) for t in tensors)
        if made_of != self._made_of:
            self._value = make()
            self._made_of = made_of
        return self._value

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        """Copy nothing."""
        return Kept, ()


def _version(tensor: torch.Tensor) -> int:
    # tensors of inference mode are not versioned: nothing there is changed in place and then read
    return 0 if tensor.is_inference() else tensor._version
