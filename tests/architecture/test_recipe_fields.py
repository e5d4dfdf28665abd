"""A recipe's fields are what its author wrote: nothing of ours writes them, ever.

Results and working state live elsewhere. So a run that fails leaves nothing behind in the recipe,
and the recipe that is saved is the one that was asked for.
"""

import ast
from collections.abc import Iterator

import pytest
from import_graph import INTEGRATIONS, modules
from writes import Write, writes

pytest.importorskip("llmcompressor")

from modifier_classes import modifier_classes, own_classes, recipe_fields

CLASSES = {cls.__name__ for modifier in modifier_classes() for cls in own_classes(modifier)}
IN_INTEGRATIONS = sorted(m for m in modules() if m.startswith(INTEGRATIONS))


def field_writes(source: str) -> list[str]:
    """Writes to fields of modifiers: in their classes, and in functions that are given one."""
    return [str(write) for name, write in _writes(ast.parse(source)) if _is_field(write, name)]


def _writes(tree: ast.AST) -> Iterator[tuple[str, Write]]:
    """Yield all writes in places where a name stands for a modifier, with that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name in CLASSES:
            yield from (("self", write) for write in writes(node))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                kind = ast.unparse(argument.annotation) if argument.annotation else ""
                if "Modifier" in kind or any(name in kind for name in CLASSES):
                    yield from ((argument.arg, write) for write in writes(node))


def _is_field(write: Write, name: str) -> bool:
    return write.path[0] == name and write.path[1] in recipe_fields() | {"?"}


# The host decides by the last of these fields of its own whether to run with data: scoped, and put
# back. In the others it notes how far a modifier has come: put back after a run that has failed.
OF_THE_HOST = ("initialized_", "started_", "ended_", "requires_calibration_data")


@pytest.mark.parametrize("module", IN_INTEGRATIONS)
def test_no_field_of_a_recipe_is_written(module):
    found = field_writes(modules()[module].read_text())
    if module == f"{INTEGRATIONS}.llm_compressor.host":
        assert len(found) == len(OF_THE_HOST)
        assert all(write.endswith(f) for write, f in zip(found, OF_THE_HOST, strict=True))
    else:
        assert found == []


@pytest.mark.parametrize(
    "write",
    [
        "self.ignore = []",
        "self.ignore += ['lm_head']",
        "self.ignore.append('lm_head')",
        "self.config_groups['group_0'] = scheme",
        "self.config_groups['group_0'].targets = []",
        "self.scheme, x = None, 1",
        "self.requires_calibration_data = False",
        "del self.scheme",
        "setattr(self, field, value)",
        "setattr(self, 'scheme', value)",
        "object.__setattr__(self, 'scheme', value)",
        "with patch_attr(self, 'ignore', []): pass",
    ],
)
def test_a_planted_write_is_found(write):
    method = f"    def on_start(self):\n        {write}\n"
    assert len(field_writes(f"class MoEQuantModifier(GPTQModifier):\n{method}")) == 1
    function = f"def start(modifier: GPTQModifier):\n    {write.replace('self', 'modifier')}\n"
    assert len(field_writes(function)) == 1
    assert field_writes(f"class Request:\n{method}") == []


def test_writing_private_state_is_no_write_of_a_field():
    method = "    def f(self):\n        self._run = 1\n        self._run.ignore = []\n"
    assert field_writes(f"class MoEQuantModifier(GPTQModifier):\n{method}") == []


def test_the_fields_are_known():
    ours, theirs = {"bits_per_weight", "scalar_frac", "mappings"}, {"ignore", "scheme"}
    assert ours | theirs | {"requires_calibration_data", "finalized_"} <= recipe_fields()
    assert {"MoEQuantModifier", "MoEQuantAWQModifier", "RWKVQuantModifier"} <= CLASSES
