"""The tokenizer of RWKV's world models: of all tokens that fit, the longest comes next.

Its tokens are bytes, 65529 of them. They are listed in ``rwkv_vocab_v20230424.txt``, which is that
of the ``rwkv`` package (version 0.8.32, by Bo Peng, under the Apache License 2.0), unchanged.
transformers wants tokens as text: here each byte is the character of that number.
"""

from __future__ import annotations

import shutil
from ast import literal_eval
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

VOCABULARY = Path(__file__).with_name("rwkv_vocab_v20230424.txt")
VOCABULARY_SIZE = 65536  # of the models; some ids at the end belong to no token
_END = "<|endoftext|>"


class RWKVWorldTokenizer(PreTrainedTokenizer):
    """Text to ids and back, exactly as the ``rwkv`` package does it.

    Id 0 begins and ends texts, and pads them on the left. Special tokens in a text are not looked
    for, and no token is put before or behind it.

    Args:
        vocab_file: lines of id, Python literal and number of bytes; ours by default.
        **kwargs: see ``PreTrainedTokenizer``.
    """

    vocab_files_names = {"vocab_file": VOCABULARY.name}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        self._vocab_file = Path(vocab_file or VOCABULARY)
        self._tokens = read_vocabulary(self._vocab_file)
        self._ids = {token: index for index, token in self._tokens.items()}
        self._trie = make_trie(self._tokens)
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _END)
        kwargs = {**special, "padding_side": "left", "split_special_tokens": True, **kwargs}
        # else transformers would give it the first id behind the vocabulary
        self._added_tokens_decoder = {0: AddedToken(_END, special=True, normalized=False)}
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        """Return the number of ids that are tokens, 0 among them."""
        return max(self._tokens) + 1

    def get_vocab(self) -> dict[str, int]:
        """Return ids by token."""
        tokens = {_as_text(token): index for index, token in self._tokens.items()}
        return {**tokens, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [_as_text(token) for token in longest_tokens(text.encode(), self._trie)]

    def _convert_token_to_id(self, token: str) -> int:
        return 0 if token == _END else self._ids[token.encode("latin-1")]

    def _convert_id_to_token(self, index: int) -> str:
        return _as_text(self._tokens[index]) if index in self._tokens else _END

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens; bytes that are no UTF-8 become the replacement character."""
        stored = (t.encode() if t == _END else t.encode("latin-1") for t in tokens)
        return b"".join(stored).decode(errors="replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the list of tokens."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / (prefix + VOCABULARY.name)
        if path.resolve() != self._vocab_file.resolve():
            shutil.copyfile(self._vocab_file, path)
        return (str(path),)


def _as_text(token: bytes) -> str:
    return token.decode("latin-1")


def read_vocabulary(path: Path) -> dict[int, bytes]:
    """Return the tokens of a vocabulary file by id.

    Raises:
        ValueError: naming the first line that is not one of such a file.
    """
    tokens = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            index, rest = line.split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            token = literal_eval(literal)
            token = token.encode() if isinstance(token, str) else token
            if not isinstance(token, bytes) or len(token) != int(length):
                raise ValueError(f"{length} bytes were announced")
            tokens[int(index)] = token
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"{path}, line {number} should be an id, a literal and its number of bytes: {error}"
            ) from error
    return tokens


Trie = dict[int, Any]  # byte -> what may follow; under _HERE the token that ends here
_HERE = -1


def make_trie(tokens: dict[int, bytes]) -> Trie:
    """Return tokens as a tree of their bytes."""
    root: Trie = {}
    for token in tokens.values():
        node = root
        for byte in token:
            node = node.setdefault(byte, {})
        node[_HERE] = token
    return root


def longest_tokens(content: bytes, trie: Trie) -> list[bytes]:
    """Cut bytes into tokens, each the longest that fits; every single byte is a token."""
    found, begin = [], 0
    while begin < len(content):
        node, longest = trie, b""
        for position in range(begin, len(content)):
            following = node.get(content[position])
            if following is None:
                break
            node = following
            longest = node.get(_HERE, longest)
        found.append(longest)
        begin += len(longest)
    return found
