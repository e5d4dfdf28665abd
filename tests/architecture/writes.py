"""Writes to attributes, found in source: ``x.y = 1``, ``setattr(x, "y", 1)`` and their kin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_SETTERS = {"setattr", "delattr", "patch_attr", "patch_attrs", "__setattr__", "__delattr__"}
_MUTATORS = {
    "add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "reverse",
    "setdefault", "sort", "update",
}  # fmt: skip


@dataclass(frozen=True)
class Write:
    """A write to something that an object holds.

    Attributes:
        path: the names that lead to it, the root first, such as ``("torch", "nn", "Linear", "f")``.
            ``"?"`` where a name is computed, ``"[]"`` for an item.
        line: where it stands.
    """

    path: tuple[str, ...]
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {'.'.join(self.path)}"


def dotted(node: ast.AST) -> tuple[str, ...] | None:
    """Return the names of ``a.b[c].d``; ``None`` where the root is a value without a name."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Starred):
        return dotted(node.value)
    if isinstance(node, ast.Call) and dotted(node.func) in {("vars",), ("type",)} and node.args:
        return dotted(node.args[0])
    if isinstance(node, ast.Attribute):
        root = dotted(node.value)
        return None if root is None else (*root, node.attr)
    if isinstance(node, ast.Subscript):
        root = dotted(node.value)
        return None if root is None else (*root, "[]")
    return None


def writes(tree: ast.AST) -> Iterator[Write]:
    """Yield all writes in ``tree``, each with the path that it is made to."""
    for node in ast.walk(tree):
        yield from (Write(path, node.lineno) for path in _written(node) if len(path) > 1)


def _written(node: ast.AST) -> Iterator[tuple[str, ...]]:
    if isinstance(node, ast.Call):
        yield from _written_by_call(node)
    elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        path = dotted(node)
        if path is not None:
            yield path


def _written_by_call(call: ast.Call) -> Iterator[tuple[str, ...]]:
    called = dotted(call.func)
    if called is not None and len(called) > 2 and called[-1] in _MUTATORS:
        yield called[:-1]
    # the setter itself, or handed on: callback(setattr, x, "y", 1), partial(setattr, x, "y")
    parts = [call.func, *call.args]
    for setter, *rest in (parts[n:] for n in range(len(parts))):
        name = dotted(setter)
        is_patch = name is not None and name[-2:] == ("patch", "object")
        if rest and name is not None and (name[-1] in _SETTERS or is_patch):
            root = dotted(rest[0])
            field = rest[1] if len(rest) > 1 else None
            known = isinstance(field, ast.Constant) and isinstance(field.value, str)
            if root is not None:
                yield (*root, field.value if known else "?")
