"""Who may import what: one rule for each folder, read from the imports of its modules."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from import_graph import PACKAGE, Import, imports, module_of, modules, needs

STANDARD = frozenset(sys.stdlib_module_names)
LLM_COMPRESSOR = "integrations/llm_compressor"


@dataclass(frozen=True)
class Rule:
    """What the modules below a path may import beside the standard library and each other.

    Attributes:
        packages: of others.
        rooms: paths of ours, each with all that is below it.
        pure_rooms: paths of ours of which only modules may be imported that, with all that they
            import in turn, need nothing but the standard library.
        lazily: packages of others, inside functions only.
        anything: whether there is no limit.
    """

    packages: frozenset[str] = frozenset()
    rooms: frozenset[str] = frozenset()
    pure_rooms: frozenset[str] = frozenset()
    lazily: frozenset[str] = frozenset()
    anything: bool = False


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HOST = words("torch numpy transformers llmcompressor compressed_tensors loguru pydantic")
OURS_BELOW = words("core models records files untrusted")  # what integrations stand on
TENSORS = Rule(
    words("torch"),
    words("checkpoint untrusted core/bit_packing core/packed_codebook"),
    words("core"),
)
# path of a folder or module -> its rule; the longest path that fits decides, whatever others say
RULES: dict[str, Rule] = {
    "__init__": Rule(
        rooms=words("checkpoint core files models integrations")
    ),  # shows public names
    "untrusted": Rule(),  # every reader of files goes through it
    "core": Rule(words("torch numpy scipy"), words("untrusted")),
    "core/names": Rule(),
    "kernels": Rule(words("torch"), words("core")),
    "models": Rule(words("torch"), words("core kernels")),
    "models/auto_class": Rule(words("transformers"), words("models")),  # its classes are the matter
    "models/expert_rules": Rule(words("transformers")),  # and here its rules
    "rwkv": Rule(words("torch transformers safetensors"), words("core models")),
    # a checkpoint is judged by its headers; only these look at what tensors hold
    "checkpoint": Rule(rooms=words("checkpoint untrusted"), pure_rooms=words("core")),
    # what transformers makes of experts is for those to say who know its rules
    "checkpoint/checks/readers": Rule(
        rooms=words("checkpoint untrusted models/expert_rules"), pure_rooms=words("models")
    ),
    "checkpoint/codes": TENSORS,
    "checkpoint/checks/source": TENSORS,
    "checkpoint/checks/values": TENSORS,
    "records": Rule(rooms=words("untrusted"), pure_rooms=words("core")),
    "records/environment": Rule(words("torch"), words("records")),  # its version and its device
    "report": Rule(words("jinja2 plotly"), words("records checkpoint untrusted"), words("core")),
    "files": Rule(rooms=words("core untrusted"), lazily=words("datasets")),
    "cli": Rule(anything=True),
    "integrations": Rule(),  # and of a folder in it that has no rule yet
    # saving a checkpoint writes its model card
    LLM_COMPRESSOR: Rule(
        HOST | words("datasets safetensors tqdm"), OURS_BELOW | {LLM_COMPRESSOR, "report"}
    ),
    # which files of a directory hold the weights is for the checkpoint's reader to say
    f"{LLM_COMPRESSOR}/checkpoint/loading": Rule(
        HOST | words("safetensors"), OURS_BELOW | {LLM_COMPRESSOR, "checkpoint"}
    ),
    f"{LLM_COMPRESSOR}/checkpoint/prediction": Rule(
        HOST, OURS_BELOW | {LLM_COMPRESSOR, "checkpoint"}
    ),
    # what a model is made of is said in the words of the checkpoint's reader
    f"{LLM_COMPRESSOR}/preflight/as_built": Rule(HOST, OURS_BELOW | {LLM_COMPRESSOR, "checkpoint"}),
    f"{LLM_COMPRESSOR}/rwkv": Rule(HOST, OURS_BELOW | {LLM_COMPRESSOR, "rwkv"}),
    # transformers quantizes while loading by running llm-compressor: this entry point leads to that
    # room, and never the other way round
    "integrations/hf": Rule(
        HOST | words("safetensors datasets optimum"),
        OURS_BELOW | {LLM_COMPRESSOR, "integrations/hf", "checkpoint", "rwkv"},
    ),
    # likewise: llama.cpp's matrices and types are measured in llm-compressor's pass
    "integrations/llama_cpp": Rule(HOST | words("gguf"), OURS_BELOW | {LLM_COMPRESSOR}),
    "integrations/optimum_cli": Rule(
        words("optimum transformers"), words("files untrusted models integrations/hf")
    ),
}


def path_of(module: str) -> str:
    """Return where a module of ours lies, as ``core/grid``."""
    return module.removeprefix(PACKAGE).removeprefix(".").replace(".", "/") or "__init__"


def is_below(path: str, room: str) -> bool:
    return path == room or path.startswith(room + "/")


def ruling_path(path: str) -> str:
    """Return the longest ruled path that ``path`` is, or is below."""
    fitting = [ruled for ruled in RULES if is_below(path, ruled)]
    assert fitting, f"no rule says what {path} may import"
    return max(fitting, key=len)


def is_pure(module: str, seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a module needs only the standard library, and all that it imports likewise."""
    source = modules()[module].read_text()
    others = {found.top for found in imports(source)} - STANDARD - {PACKAGE}
    deeper = needs(source) - seen - {module}
    return not others and all(is_pure(m, seen | {module}) for m in deeper)


def is_allowed(found: Import, path: str) -> bool:
    ruled = ruling_path(path)
    rule = RULES[ruled]
    if rule.anything or found.top in STANDARD:
        return True
    if found.top != PACKAGE:
        return found.top in rule.packages or (found.is_lazy and found.top in rule.lazily)
    module = module_of(found.name)
    if module is None:
        return False
    to = path_of(module)
    own = is_below(to, ruled) and ruling_path(to) == ruled
    if own or any(is_below(to, room) for room in rule.rooms):
        return True
    return any(is_below(to, room) for room in rule.pure_rooms) and is_pure(module)


def violations(source: str, path: str) -> set[str]:
    """Return the imports of ``source`` that a module at ``path`` may not have."""
    return {found.name for found in imports(source) if not is_allowed(found, path)}


MODULES = [pytest.param(path_of(name), file, id=path_of(name)) for name, file in modules().items()]


@pytest.mark.parametrize(("path", "file"), MODULES)
def test_imports_are_allowed(path, file):
    assert violations(file.read_text(), path) == set()


@pytest.mark.parametrize("package", ["torch", "transformers", "llmcompressor", "a_stranger"])
def test_a_foreign_import_is_found_in_every_module_that_may_not_have_it(package):
    """What one module may import widens the rule of no other, in whatever order they are read."""
    unseen = set()
    for module in [*modules(), *reversed(modules())]:
        path = path_of(module)
        rule = RULES[ruling_path(path)]
        may = rule.anything or package in rule.packages
        if not may and not violations(f"def f():\n    import {package}", path):
            unseen.add(path)
    assert unseen == set()


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/grid", "import transformers"),
        ("core/names", "import torch"),
        ("core/grid", "def f():\n    from moeq_plugin.models import moe"),
        ("core/grid", "from moeq_plugin import evaluate"),
        ("models/moe", "from llmcompressor import oneshot"),
        ("models/moe", "class A:\n    import transformers"),
        ("models/moe", "if TYPE_CHECKING:\n    from moeq_plugin.rwkv import layers"),
        ("checkpoint/verify", "import torch"),
        ("checkpoint/checks/schemes", "import torch"),
        ("checkpoint/verify", "from moeq_plugin.core.grid import round_to_grid"),  # it needs torch
        ("checkpoint/verify", "from moeq_plugin.records.run import RunRecord"),
        ("records/run", "from moeq_plugin.checkpoint import schemes"),
        ("report/page", "import torch"),
        ("files/sampled_set", "import datasets"),
        ("files/atomic", "from moeq_plugin.records import run"),
        (f"{LLM_COMPRESSOR}/solving", "import moeq_plugin.integrations.hf.coverage"),
        (f"{LLM_COMPRESSOR}/solving", "def f():\n    from moeq_plugin.integrations import hf"),
        (f"{LLM_COMPRESSOR}/solving", "import moeq_plugin.rwkv.layers"),
        (f"{LLM_COMPRESSOR}/solving", "from moeq_plugin.cli import shared"),
        ("integrations/hf/coverage", "import moeq_plugin.cli.convert"),
        (f"{LLM_COMPRESSOR}/solving", "import moeq_plugin.integrations.llama_cpp.ggml"),
        (f"{LLM_COMPRESSOR}/solving", "import gguf"),
        ("integrations/optimum_cli/moeq", "from moeq_plugin.cli.shared import read_dataset"),
        ("integrations/optimum_cli/moeq", "from moeq_plugin.integrations import llm_compressor"),
    ],
)
def test_a_planted_violation_is_found(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/grid", "import os.path, torch\nfrom moeq_plugin.core import hessian"),
        ("files/sampled_set", "def f():\n    import datasets"),
        ("report/page", "from moeq_plugin.checkpoint import headers"),
        ("checkpoint/checks/values", "import torch\nfrom moeq_plugin.checkpoint import codes"),
        ("integrations/hf/coverage", "from moeq_plugin.integrations import llm_compressor"),
    ],
)
def test_an_allowed_import_is_no_violation(path, source):
    assert violations(source, path) == set()


def test_every_module_is_ruled_and_every_rule_is_of_something():
    assert {ruling_path(path_of(module)) for module in modules()} == set(RULES)


@pytest.mark.parametrize("module", ["", ".core.names", ".checkpoint.verify", ".report.page"])
def test_importing_loads_no_framework(module):
    named = frozenset().union(*(rule.packages | rule.lazily for rule in RULES.values()))
    heavy = sorted(named - {"jinja2", "plotly"})
    code = f"import sys, {PACKAGE}{module}; assert not set(sys.modules) & set({heavy})"
    subprocess.run([sys.executable, "-c", code], check=True)


def files_that_import(room: str) -> Iterator[str]:
    for module, file in modules().items():
        if any(is_below(path_of(needed), room) for needed in needs(file.read_text())):
            yield path_of(module)


def test_nothing_imports_the_command_line():
    assert {path for path in files_that_import("cli") if not is_below(path, "cli")} == set()
