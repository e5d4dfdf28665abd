"""Every example in a docstring is run, in the module as it is installed."""

import doctest
from contextlib import suppress
from importlib import import_module

import pytest
from import_graph import INTEGRATIONS, modules

WITH_EXAMPLES = sorted(module for module, path in modules().items() if ">>>" in path.read_text())


@pytest.fixture(autouse=True)
def host_has_said_what_it_says_on_import():
    with suppress(ImportError):
        import_module("llmcompressor")


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_say(name):
    if name.startswith(INTEGRATIONS):
        pytest.importorskip("llmcompressor")
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in doctest.DocTestFinder().find(import_module(name), name):
        runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries > 0, "its examples are in no docstring, so that nothing runs them"
