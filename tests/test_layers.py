"""The folder list is the architecture: who may import whom, checked by reading imports."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, INTEGRATIONS = ROOT / "moeq_plugin", ROOT / "integrations"
FRAMEWORKS = {
    "transformers", "llmcompressor", "compressed_tensors", "optimum", "vllm", "datasets",
    "accelerate", "gptqmodel", "lm_eval",
}  # fmt: skip
OURS = "moeq_plugin."
# part -> what its modules may import: frameworks, and other parts of ours
ALLOWED = {
    "core": {"scipy", "numpy", "torch", OURS + "core"},
    "models": {"torch", OURS + "core", OURS + "models"},
    "checkpoint": {"torch", OURS + "checkpoint"},
    "report": {"jinja2", "plotly", OURS + "report"},
    "cli": FRAMEWORKS | {"typer", "rich", "tqdm", "loguru", "torch", "moeq_plugin"},
    "integrations/llm_compressor": {
        "torch", "numpy", "transformers", "llmcompressor", "compressed_tensors", "datasets",
        "loguru", "pydantic", "safetensors", "tqdm", OURS + "core", OURS + "models",
        OURS + "report", OURS + "integrations.llm_compressor",
    },
    "integrations/llm_compressor/awq": {
        "torch", "llmcompressor", "compressed_tensors", "loguru", "pydantic", OURS + "core",
        OURS + "models", OURS + "report", OURS + "integrations.llm_compressor",
    },
    # transformers quantizes while loading by running llm-compressor: this door leads to that room,
    # and never the other way round
    "integrations/hf": {
        "torch", "transformers", "llmcompressor", "compressed_tensors", "safetensors", "datasets",
        "loguru", "optimum", OURS + "core", OURS + "models", OURS + "report",
        OURS + "integrations.llm_compressor", OURS + "integrations.hf",
    },
    "integrations/optimum_cli": {
        "optimum", "transformers", OURS + "cli.shared", OURS + "integrations.hf",
    },
}  # fmt: skip
# The RWKV models are models of transformers, which has none after version 4. They are the only
# modules of `models` that may need it: adapters to models of others recognize these without.
OF_TRANSFORMERS = "models/rwkv"
STANDARD = set(__import__("sys").stdlib_module_names)


def imports(source: str) -> set[str]:
    """Return the dotted names of all modules that ``source`` imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module)
    return names


def violations(source: str, allowed: set[str]) -> set[str]:
    return {
        name
        for name in imports(source)
        if name.split(".")[0] not in STANDARD
        and not any(name == a or name.startswith(a + ".") for a in allowed)
    }


def folders():
    for part, allowed in ALLOWED.items():
        root = PACKAGE / part if (PACKAGE / part).is_dir() else ROOT / part
        for path in sorted(root.glob("*.py")):
            if f"{part}/{path.name}".startswith(OF_TRANSFORMERS):
                allowed = allowed | {"transformers", "safetensors"}
            yield pytest.param(path, allowed, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize(("path", "allowed"), list(folders()))
def test_imports_point_one_way_only(path, allowed):
    assert violations(path.read_text(), allowed) == set()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "import transformers"),
        ("core", "def f():\n    from moeq_plugin.models import moe"),
        ("models", "from llmcompressor import oneshot"),
        ("report", "import torch"),
        ("integrations/llm_compressor", "import moeq_plugin.integrations.hf.coverage"),
        ("integrations/llm_compressor", "def f():\n    from moeq_plugin.integrations.hf import a"),
        ("integrations/hf", "import moeq_plugin.cli.convert"),
        ("integrations/optimum_cli", "from moeq_plugin.integrations import llm_compressor"),
    ],
)
def test_a_planted_violation_is_found(part, source):
    assert violations(source, ALLOWED[part])


def test_every_folder_of_modules_is_ruled_and_packaged():
    found = {p.parent for root in (PACKAGE, INTEGRATIONS) for p in root.rglob("*.py")}
    named = {str(p.relative_to(ROOT)).replace("/", ".") for p in found}
    named -= {"integrations.optimum_cli"}  # installed under a name of Optimum's
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    packages = {n if n.startswith("moeq") else f"moeq_plugin.{n}" for n in named}
    assert packages | {"optimum.commands.register"} == set(packaged)
    ruled = {part if "/" in part else f"moeq_plugin/{part}" for part in ALLOWED}
    assert {str(p.relative_to(ROOT)) for p in found} - {"moeq_plugin", "integrations"} == ruled


def test_importing_the_package_loads_no_framework():
    import subprocess
    import sys

    code = f"import sys, moeq_plugin; assert not {FRAMEWORKS | {'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_stay_short():
    lengths = {
        p: len(p.read_text().splitlines()) for r in (PACKAGE, INTEGRATIONS) for p in r.rglob("*.py")
    }
    assert {p.name: n for p, n in lengths.items() if n > 400} == {}
