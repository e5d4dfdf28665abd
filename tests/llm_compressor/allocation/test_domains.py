"""Which domains there are, and which cannot be measured."""

import pytest
import torch

pytest.importorskip("llmcompressor")

from moeq_plugin.integrations.llm_compressor.allocation.domains import Domains


def batches(*domains):
    return [
        {"input_ids": torch.zeros(len(of), 4), "domain": torch.tensor(of)} for of in domains if of
    ]


def test_domains_are_those_that_occur_in_whatever_batches():
    names = ("wiki", "code", "math")
    found = Domains.of(batches([2, 0], [0, 2, 2]), names)
    assert (found.numbers, found.names) == ((0, 2), ("wiki", "math"))
    assert Domains.of(batches([0, 0, 2, 2, 2]), names) == found


def test_without_a_column_there_is_one_domain_with_a_number_for_a_name():
    found = Domains.of([{"input_ids": torch.zeros(2, 4)}], None)
    assert (found.numbers, found.names) == ((0,), ("0",))


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        ([], None, r"at least two sequences are needed \(of each domain\), got {}"),
        (batches([0, 0, 1]), None, r"at least two sequences .* got {1: 1}"),
        (batches([0, 0, 1, 1]), ("wiki",), r"must hold 0 to 0 for the domains \['wiki'\]"),
        (batches([-1, -1]), ("wiki",), r"must hold 0 to 0 .* got \[-1\]"),
    ],
    ids=["nothing", "too-few", "no-name", "negative"],
)
def test_refuses(data, names, message):
    with pytest.raises(ValueError, match=message):
        Domains.of(data, names)
