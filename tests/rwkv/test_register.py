"""The package is one direction of imports, and changes transformers in one documented place."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.rwkv.modeling_rwkv import RwkvPreTrainedModel

import moeq_plugin.rwkv
from moeq_plugin.rwkv import RWKV6Config, RWKV6ForCausalLM, RWKV7Config, RWKV7ForCausalLM, register

PACKAGE = "moeq_plugin.rwkv"
FOLDER = Path(moeq_plugin.rwkv.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in FOLDER.glob("*.py")}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(tree):
    """Return the modules of this package that one of them imports, at any depth."""
    froms = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    named = {name for name in froms | plain if name and name.startswith(PACKAGE)}
    return {name.removeprefix(PACKAGE).removeprefix(".") or "__init__" for name in named}


def test_no_module_leads_back_to_itself():
    graph = {name: imported(tree) for name, tree in MODULES.items()}

    order = list(TopologicalSorter(graph).static_order())  # raises on a circle

    assert order[-1] == "__init__"
    assert set(order) == set(MODULES)


def test_no_function_imports_anything():
    inside = [
        name
        for name, tree in MODULES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert inside == []


ALONE = """
import importlib, sys, types
from transformers.models.rwkv.modeling_rwkv import RwkvPreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

before = RwkvPreTrainedModel._init_weights
for name in {modules}:
    for loaded in [n for n in sys.modules if n.startswith("{package}")]:
        del sys.modules[loaded]
    bare = types.ModuleType("{package}")  # stands for the package, whose __init__ imports them all
    bare.__path__ = [{folder!r}]
    sys.modules["{package}"] = bare
    importlib.import_module("{package}." + name)
    assert RwkvPreTrainedModel._init_weights is before, name
    assert not {{"rwkv6", "rwkv7"}} & set(CONFIG_MAPPING), name
"""


def test_each_module_loads_by_itself_and_changes_nothing():
    names = sorted(set(MODULES) - {"__init__"})
    run(ALONE.format(modules=names, package=PACKAGE, folder=str(FOLDER)))


GUARD = """
import importlib, pkgutil, sys
import moeq_plugin.models as models
for module in pkgutil.iter_modules(models.__path__):
    importlib.import_module("moeq_plugin.models." + module.name)
assert "transformers" not in sys.modules

from torch import nn
from transformers import RwkvConfig, RwkvModel
model = RwkvModel(RwkvConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, context_length=8))
compressed = nn.Linear(8, 8)
del compressed.weight
try:
    model._init_weights(compressed)
except AttributeError as error:
    assert "weight" in str(error)
else:
    raise AssertionError("patched before moeq_plugin.rwkv was imported, or no longer needed")

import moeq_plugin.rwkv
model._init_weights(compressed)
"""


def test_transformers_is_as_it_was_until_the_package_is_imported():
    run(GUARD)


@pytest.mark.parametrize(
    ("config", "model"),
    [(RWKV6Config, RWKV6ForCausalLM), (RWKV7Config, RWKV7ForCausalLM)],
    ids=["rwkv6", "rwkv7"],
)
def test_a_second_registration_changes_nothing(config, model):
    initialize = RwkvPreTrainedModel._init_weights

    register()
    register()

    assert RwkvPreTrainedModel._init_weights is initialize
    assert type(AutoConfig.for_model(config.model_type)) is config
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 16}
    assert type(AutoModelForCausalLM.from_config(config(**sizes))) is model
    assert type(AutoModel.from_config(config(**sizes))) is model.model_class
