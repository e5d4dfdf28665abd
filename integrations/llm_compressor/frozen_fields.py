"""Recipe fields that say what was asked for, and nothing else, from construction to the end."""

from __future__ import annotations

from typing import Any

from llmcompressor.modifiers import Modifier
from pydantic import BaseModel

# what the host itself writes while it runs a modifier
HOST_STATE = frozenset(Modifier.model_fields)


class FrozenFields(BaseModel):
    """Mixed into a modifier: its recipe fields cannot be written after construction.

    ``recipe.yaml`` is written from the fields, and a failed ``oneshot`` leaves them to the next:
    a field used as working memory would make both of them lie. What a run works out is kept
    elsewhere.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is not a field of the recipe.

        Raises:
            AttributeError: for a field of the recipe.
        """
        if name in type(self).model_fields and name not in HOST_STATE:
            raise AttributeError(
                f"{type(self).__name__}.{name} says what was asked for and is never written: make "
                f"a new modifier, or use modifier.model_copy(update={{{name!r}: ...}})"
            )
        super().__setattr__(name, value)
