"""What belongs to others is changed in one file, and in modules whose ``register()`` says so."""

import ast
from collections.abc import Iterator

import pytest
from import_graph import INTEGRATIONS, PACKAGE, modules
from writes import Write, dotted, writes

HOST = f"{INTEGRATIONS}.llm_compressor.host"
REGISTRATIONS = {f"{PACKAGE}.rwkv.register"}  # each with a function of that name


def foreign_names(tree: ast.AST) -> set[str]:
    """Names that stand for a module, class or function of others, wherever they are bound."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not alias.name.startswith(PACKAGE):
                    names.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith(PACKAGE):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.arg) and node.annotation is not None:
            # a function that is given a class may be given one of others
            names |= {node.arg} if ast.unparse(node.annotation).startswith("type[") else set()
    while True:  # other names for them, until there are no more
        more = set(_aliases(tree, names)) - names
        if not more:
            return names
        names |= more


def _aliases(tree: ast.AST, names: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values = [node.value]
        elif isinstance(node, ast.For | ast.comprehension):
            targets = [node.target]
            is_listed = isinstance(node.iter, ast.Tuple | ast.List | ast.Set)
            values = node.iter.elts if is_listed else []
        else:
            continue
        if any((path := dotted(value)) and path[0] in names for value in values):
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def changes_of_others(source: str) -> list[Write]:
    tree = ast.parse(source)
    names = foreign_names(tree)
    # os.environ["A"] = "b" is what the item is for; a class of others has no items to fill
    return [w for w in writes(tree) if w.path[0] in names and w.path[:2] != ("os", "environ")]


@pytest.mark.parametrize("module", sorted(set(modules()) - REGISTRATIONS - {HOST}))
def test_nothing_of_others_is_changed(module):
    assert [str(write) for write in changes_of_others(modules()[module].read_text())] == []


@pytest.mark.parametrize("module", sorted(REGISTRATIONS))
def test_registrations_are_documented(module):
    tree = ast.parse(modules()[module].read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(functions["register"])


@pytest.mark.parametrize(
    "change",
    [
        "IntermediatesCache.from_dataloader = f",
        "pipelines.cache.IntermediatesCache.from_dataloader = f",
        "torch.nn.Linear.forward = f",
        "torch.nn.Linear.forward: Any = f",
        "torch.backends.flag |= True",
        "del torch.nn.Linear.forward",
        "torch.nn.Linear.forward, x = f, 1",
        "for torch.flag in range(2): pass",
        "with open(p) as torch.file: pass",
        "setattr(IntermediatesCache, 'from_dataloader', f)",
        "setattr(IntermediatesCache, name, f)",
        "type(torch.nn).forward = f",
        "type.__setattr__(IntermediatesCache, 'from_dataloader', f)",
        "undo.callback(setattr, pipelines, '_FLAG', True)",
        "return lambda: setattr(IntermediatesCache, 'from_dataloader', f)",
        "with patch_attr(IntermediatesCache, 'pin_memory', f): pass",
        "with utils.patch_attr(pipelines, 'flag', f): pass",
        "with mock.patch.object(IntermediatesCache, 'pin_memory', f): pass",
        "pipelines.REGISTRY['moeq'] = f",
        "pipelines.REGISTRY.update(moeq=f)",
        "IntermediatesCache.__dict__['from_dataloader'] = f",
        "vars(pipelines)['flag'] = True",
        "given.forward = f",
        "cls = pipelines.cache.IntermediatesCache\n    cls.from_dataloader = f",
        "for cls in (torch.nn.Linear, IntermediatesCache):\n        cls.forward = f",
    ],
)
def test_a_planted_change_is_found(change):
    source = (
        "import torch.nn\n"
        "from llmcompressor import pipelines\n"
        "from llmcompressor.pipelines.cache import IntermediatesCache\n"
        f"def f(given: type[Any]):\n    {change}\n"
    )
    assert len(changes_of_others(source)) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        "tensor = torch.ones(2)\n    tensor.grad = None",
        "self.cache = torch.ones(2)",
        "model.config.use_cache = False",
        "os.environ['A'] = 'b'",
        "AutoConfig.register('rwkv7', Config)",
        "with patch_attr(arguments, 'flag', False): pass",
        "parts = []\n    parts.append(torch.ones(2))",
    ],
)
def test_writing_to_what_is_ours_is_not(harmless):
    assert changes_of_others(f"import os, torch\ndef f(self, model):\n    {harmless}\n") == []


def test_no_module_reads_its_callers_frames():
    asking = ("_getframe", "currentframe", "inspect.stack")
    found = {m for m, p in modules().items() if any(word in p.read_text() for word in asking)}
    assert found == set()
