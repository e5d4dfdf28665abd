"""Every module is installed, and its name says what it is."""

import tomllib
from collections import defaultdict

from import_graph import INSTALLED_AS, INTEGRATIONS, PACKAGE, ROOT, is_package, modules

import moeq_plugin

# Names that several modules of one part have, because they do the same for different things.
SHARED_NAMES = {
    "modifier": "each method has one class that recipes name",
    "request": "what a recipe asks for, resolved and frozen: of a run, and of bits",
    "saving": "what a method adds to saving, beside what all of them do",
}


def part_of(module):
    """The folder of the top level that a module is in, that of its framework in integrations."""
    depth = 3 if module.startswith(INTEGRATIONS) else 2
    return ".".join(module.split(".")[:depth])


def shared_names(names):
    """Last names that several modules of one part have."""
    homes = defaultdict(list)
    for module in names:
        homes[part_of(module), module.rpartition(".")[2]].append(module)
    return {name: sorted(found) for (_, name), found in homes.items() if len(found) > 1}


def test_names_that_mean_different_things_differ():
    shared = shared_names(module for module in modules() if not is_package(module))
    assert {name: homes for name, homes in shared.items() if name not in SHARED_NAMES} == {}
    assert set(SHARED_NAMES) <= set(shared), "these names are shared no more"


def test_a_planted_second_name_is_found():
    names = [f"{PACKAGE}.core.grid", f"{PACKAGE}.core.deep.grid", f"{PACKAGE}.models.grid"]
    assert shared_names(names) == {"grid": sorted(names[:2])}
    hosts = [f"{INTEGRATIONS}.hf.host", f"{INTEGRATIONS}.llm_compressor.host"]
    assert shared_names(hosts) == {}


def setup_of(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())


OPTIMUM_CLI = ROOT / "integrations" / "optimum_cli"


def test_every_folder_of_modules_is_packaged():
    setup = setup_of(ROOT)["tool"]["setuptools"]
    folders = {module if is_package(module) else module.rpartition(".")[0] for module in modules()}
    elsewhere = {f"{INTEGRATIONS}.{OPTIMUM_CLI.name}"}  # a distribution of its own
    assert folders - elsewhere == set(setup["packages"])
    for folder, package in INSTALLED_AS.items():
        assert setup["package-dir"][package] == str(folder.relative_to(ROOT))


def test_no_file_stands_in_a_package_of_others():
    """A file below ``optimum/`` would make ``is_optimum_available()`` true without Optimum."""
    setup = setup_of(ROOT)["tool"]["setuptools"]
    named = [*setup["packages"], *setup["package-dir"], *setup["package-data"]]
    assert {name.partition(".")[0] for name in named} == {PACKAGE}


def test_the_command_for_optimum_comes_with_optimum_and_this_version():
    project = setup_of(OPTIMUM_CLI)["project"]
    assert project["version"] == moeq_plugin.__version__
    assert f"moeq-plugin=={moeq_plugin.__version__}" in project["dependencies"]
    assert any(of.startswith("optimum>") for of in project["dependencies"])
