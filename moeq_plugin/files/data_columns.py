"""What a row of data says: ids, text, or a conversation in the words of the chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

# columns with one text, with a list of messages, and the answers to a `prompt`, best first
_TEXT = ("text", "content")
_MESSAGES = ("messages", "conversations")
_ANSWERS = ("response", "completion")
# words of the format of `conversations`, as the templates know them
_ROLES = {"human": "user", "gpt": "assistant"}
EXPECTED = (
    "expected `text`, `content`, `messages`, `conversations`, `prompt` with `response`, or "
    "`input_ids`"
)


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Attributes:
        column: that they are read from, in words.
        is_ids: whether token ids come out, and not text.
        read: from a row to either, empty if there is nothing in it.
    """

    column: str
    is_ids: bool
    read: Callable[[Mapping[str, Any]], Any]


def reading_of(columns: Sequence[str], tokenizer: Any, max_tokens: int, chat: bool) -> Reading:
    """Return how rows with these columns are read.

    Args:
        columns: their names.
        tokenizer: of the model; without one, or without a chat template, conversations become
            their texts, one paragraph for each message.
        max_tokens: of a conversation, at most.
        chat: whether to use the template.

    Raises:
        ValueError: if there is nothing to read in them.
    """
    plain = next((name for name in ("input_ids", *_TEXT) if name in columns), None)
    if plain is not None:
        return Reading(f"`{plain}`", plain == "input_ids", itemgetter(plain))
    name = next((name for name in _MESSAGES if name in columns), None)
    answer = next((of for of in _ANSWERS if of in columns), None)
    if name is None and ("prompt" not in columns or answer is None):
        raise ValueError(f"the columns {', '.join(columns)}: {EXPECTED}")

    def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
        if name is not None:
            return [_message(of) for of in row[name] or ()]
        both = {"user": row["prompt"], "assistant": row[answer or "response"]}
        return [{"role": role, "content": text} for role, text in both.items() if text]

    what = f"`{name}`" if name is not None else f"`prompt` and `{answer}`"
    if not (chat and getattr(tokenizer, "chat_template", None)):
        why = "no chat template in this tokenizer: " if chat and tokenizer is not None else ""
        joined = f"{what} ({why}messages joined as plain paragraphs)"
        return Reading(joined, False, lambda row: "\n\n".join(m["content"] for m in messages(row)))

    def ids(row: Mapping[str, Any]) -> list[int]:
        said = messages(row)
        if not any(message["content"].strip() for message in said):
            return []  # a template would write its own words around nothing
        settings = {"return_dict": True, "truncation": True, "max_length": max_tokens}
        return list(tokenizer.apply_chat_template(said, **settings)["input_ids"])

    return Reading(f"{what} through the chat template", True, ids)


def _message(of: Mapping[str, Any]) -> dict[str, str]:
    """Return a message with ``role`` and ``content``, also of one with ``from`` and ``value``.

    Raises:
        ValueError: if it is neither.
    """
    role, content = of.get("role", of.get("from")), of.get("content", of.get("value"))
    if isinstance(content, list):  # of text and pictures
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(text for text in texts if text)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("a message has neither `role` and `content` nor `from` and `value`")
    return {"role": _ROLES.get(role, role), "content": content}
