"""A modifier serves one run, and is finished only where that run has calibrated to its end."""

from __future__ import annotations

from typing import Any

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier


class OneRun:
    """Mixed into a modifier, before its other bases: what a run leaves in it serves no other run.

    A notebook calls ``oneshot`` again with the same object after Ctrl-C. The host then finalizes
    what has failed, as if it had been done, and initializes nothing.

    No ``Modifier`` itself: the defaults of its fields would come before those of the other bases.
    """

    def initialize(self, state: State, **kwargs: Any) -> None:
        """Begin a run.

        Raises:
            ValueError: if another run has begun with this object, whether it finished or not.
        """
        assert isinstance(self, Modifier)  # what it is mixed into
        if self.initialized_:
            raise ValueError(
                f"this {type(self).__name__} has been used by another run: make a new one for this"
            )
        Modifier.initialize(self, state, **kwargs)

    def finalize(self, state: State, **kwargs: Any) -> None:
        """End a run; the host also asks for it before the next run, where one has failed."""
        assert isinstance(self, Modifier)  # what it is mixed into
        if self.ended_:
            Modifier.finalize(self, state, **kwargs)
