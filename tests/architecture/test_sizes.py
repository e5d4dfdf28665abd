"""What a reader has to take in at once stays small."""

import ast
import inspect
import statistics
from pathlib import Path

import pytest
from import_graph import is_package, modules

pytest.importorskip("llmcompressor")

from modifier_classes import host_class, modifier_classes

MEDIAN_MODULE, LONGEST_MODULE = 120, 400
LONGEST = {ast.ClassDef: 250, ast.FunctionDef: 70, ast.AsyncFunctionDef: 70}
LONGEST_MODIFIER, PRIVATE_ATTRIBUTES = 200, 8


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def too_long(source: str) -> dict[str, int]:
    """Names of the classes and functions that are longer than allowed, with their lines."""
    nodes = [node for node in ast.walk(ast.parse(source)) if type(node) in LONGEST]
    lines = {node: node.end_lineno - node.lineno + 1 for node in nodes}
    return {node.name: n for node, n in lines.items() if n > LONGEST[type(node)]}


def test_the_median_module_is_short():
    lengths = [num_lines(path) for module, path in modules().items() if not is_package(module)]
    assert statistics.median(lengths) <= MEDIAN_MODULE


def test_no_module_is_long():
    lengths = {module: num_lines(path) for module, path in modules().items()}
    assert {m: n for m, n in lengths.items() if n > LONGEST_MODULE} == {}


@pytest.mark.parametrize("module", modules())
def test_no_class_and_no_function_is_long(module):
    assert too_long(modules()[module].read_text()) == {}


def test_what_is_too_long_is_found():
    body = "    x = 1\n" * 70
    assert too_long(f"def f():\n{body}") == {"f": 71}
    assert too_long(f"def f():\n{body[:-10]}") == {}
    assert too_long(f"class A:\n  async def f():\n{body}") == {"f": 71}
    assert too_long("class A:\n" + body * 4) == {"A": 281}


@pytest.mark.parametrize("modifier", modifier_classes(), ids=lambda cls: cls.__name__)
def test_a_modifier_is_short_and_has_little_state(modifier):
    assert len(inspect.getsourcelines(modifier)[0]) <= LONGEST_MODIFIER
    # what a class of ours leaves to it counts, what a class of the host does, does not
    inherited = set(host_class(modifier).__private_attributes__)
    private = sorted(set(modifier.__private_attributes__) - inherited)
    assert len(private) <= PRIVATE_ATTRIBUTES, private
