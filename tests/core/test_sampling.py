"""Laws E1 to E5 and E9 of the search, on toy models whose every sequence can be enumerated."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.beam_search import BeamSearch
from moeq_plugin.core.sampling import (
    EBSSConfig,
    completes_old_ngram,
    expert_imbalance,
    stay_in_place,
)

LAYERS, EXPERTS, TOP_K = 2, 4, 2


class Toy:
    """A chain over few tokens, with a router that depends on the token alone.

    Probabilities depend on the position too: otherwise sequences with the same transitions in
    another order would be exactly equal, and which one is found a matter of rounding.
    """

    def __init__(self, vocabulary, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(20, vocabulary, vocabulary, generator=generator)
        routes = torch.rand(vocabulary, LAYERS, EXPERTS, generator=generator).argsort(-1)
        self.load = torch.zeros(vocabulary, LAYERS, EXPERTS, dtype=torch.int32)
        self.load.scatter_(2, routes[..., :TOP_K], 1)

    def after(self, tokens, position):
        """Return logits and load of ``tokens``, ``[sequences, branches]``, at a position."""
        return self.logits[position, tokens], self.load[tokens]

    def log_probs(self, ids):
        """Return the log-probability of each token but the first."""
        table = self.logits.double().log_softmax(-1)
        return [table[at, a, b].item() for at, (a, b) in enumerate(itertools.pairwise(ids))]

    def search(self, config, start, **options):
        """Drive a search to its end; return it and its sequences."""
        tokens = torch.tensor(start)
        search = BeamSearch(tokens, range(len(start)), config, **options)
        position = tokens.shape[1] - 1
        logits, _ = self.after(tokens[:, -1:], position)
        load = self.load[tokens].sum(1, keepdim=True)
        while not search.is_done:
            if search.input_ids.shape[2] <= position + config.prefix_tokens:
                tokens = search.sample(logits, load, torch.full((len(start),), 0.5)).tokens
            else:
                tokens = search.advance(logits, load).tokens
            logits, load = self.after(tokens, search.input_ids.shape[2] - 1)
        return search, search.finish(load)

    def sigma(self, ids):
        """Eq. 3 and 4 in plain loops."""
        layers = []
        for layer in range(LAYERS):
            usage = [
                sum(int(self.load[token, layer, expert]) for token in ids) / len(ids)
                for expert in range(EXPERTS)
            ]
            layers.append(statistics.stdev(usage))
        return statistics.fmean(layers)

    def cost(self, ids, tau):
        """Eq. 10 of a complete sequence."""
        return -sum(self.log_probs(ids)) / len(ids) + self.sigma(ids) / tau

    def slow_search(self, config, start, *, sigma_of_child=False):
        """Eq. 13 and 14 with lists: every token of every parent, then the best of all."""
        beams = [(0.0, start)]
        table = self.logits.double().log_softmax(-1).tolist()
        for position in range(len(start) - 1, config.seq_len - 1):
            candidates = []
            for total, ids in beams:
                for token in range(len(self.load)):
                    grown, child = total + table[position][ids[-1]][token], [*ids, token]
                    sigma = self.sigma(child if sigma_of_child else ids)
                    candidates.append((-grown / len(child) + sigma / config.tau, grown, child))
            candidates.sort(key=lambda candidate: candidate[0])
            beams = [candidate[1:] for candidate in candidates[: config.beam_width]]
        return min((child for _, child in beams), key=lambda ids: self.cost(ids, config.tau))


def config(**changes):
    guided = {"prefix_tokens": 0, "seq_len": 8, "num_sequences": 1, "tau": 1.2}
    return EBSSConfig(**{**guided, **changes})


class TestExpertImbalance:
    def test_equals_a_loop_for_any_leading_dimensions(self):
        load = torch.randint(0, 50, (3, 2, LAYERS, EXPERTS))
        tokens = torch.randint(1, 90, (3, 2))
        ours = expert_imbalance(load, tokens)
        for i, j in itertools.product(range(3), range(2)):
            rows = (load[i, j] / tokens[i, j]).tolist()
            assert ours[i, j].item() == pytest.approx(
                statistics.fmean(statistics.stdev(row) for row in rows), rel=1e-5
            )

    def test_uniform_load_and_no_tokens_give_zero(self):
        assert expert_imbalance(torch.full((3, 8), 7), 28) == 0
        assert expert_imbalance(torch.zeros(3, 8), 0) == 0
        assert expert_imbalance(torch.tensor([[9]]), 9) == 0  # a single expert

    @pytest.mark.parametrize(
        ("experts", "top_k", "expected"),
        [(64, 6, 0.2938), (8, 2, 0.4629)],
        ids=["deepseek", "mixtral"],
    )
    def test_all_tokens_to_one_set_of_experts_is_the_closed_form(self, experts, top_k, expected):
        load = torch.zeros(1, experts)
        load[0, :top_k] = 10
        inner = top_k * (1 / top_k - 1 / experts) ** 2 + (experts - top_k) / experts**2
        closed = top_k * math.sqrt(inner / (experts - 1))
        assert expert_imbalance(load, 10).item() == pytest.approx(closed, rel=1e-5)
        assert closed == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tau", [1.2, 0.3, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_holds_everything_finds_the_true_minimum(seed, tau):
    toy = Toy(3, seed)
    _, [found] = toy.search(config(seq_len=6, beam_width=3**5, tau=tau), [[0]])
    best = min(
        ([0, *rest] for rest in itertools.product(range(3), repeat=5)),
        key=lambda ids: toy.cost(ids, tau),
    )
    assert found.input_ids == best


@pytest.mark.parametrize("tau", [math.inf, 1.2, 0.2, 0.05])
@pytest.mark.parametrize("beam_width", [1, 2, 4])
def test_equals_a_slow_search_that_follows_the_equations(beam_width, tau):
    for seed in range(12):
        toy = Toy(6, seed)
        settings_ = config(seq_len=9, beam_width=beam_width, tau=tau)
        starts = [[2], [5]]
        _, found = toy.search(settings_, starts)
        for start, sequence in zip(starts, found, strict=True):
            assert sequence.input_ids == toy.slow_search(settings_, start)


def test_the_slow_search_tells_the_parents_imbalance_from_the_childs():
    settings_ = config(seq_len=9, beam_width=2, tau=0.2)
    toys = [Toy(6, seed) for seed in range(12)]
    differ = [t.slow_search(settings_, [2]) != t.slow_search(settings_, [2], sigma_of_child=True)
              for t in toys]  # fmt: skip
    assert sum(differ) > 3  # or the test above would not see the difference


def test_one_branch_without_balance_is_greedy():
    toy = Toy(6, 0)
    _, [found] = toy.search(config(beam_width=1, tau=math.inf), [[3]])
    ids = [3]
    while len(ids) < 8:
        ids.append(int(toy.logits[len(ids) - 1, ids[-1]].argmax()))
    assert found.input_ids == ids


@pytest.mark.parametrize("prefix_tokens", [0, 3])
def test_loads_likelihood_and_imbalance_belong_to_the_returned_tokens(prefix_tokens):
    toy = Toy(7, 1)
    settings_ = config(seq_len=12, prefix_tokens=prefix_tokens, tau=0.1)
    search, found = toy.search(settings_, [[0, 1], [4, 4], [6, 2]])
    for row, sequence in enumerate(found):
        assert torch.equal(torch.tensor(sequence.load), toy.load[sequence.input_ids].sum(0))
        total = sum(toy.log_probs(sequence.input_ids)[1:])
        assert sequence.nll == pytest.approx(-total / 10, rel=1e-5)  # two tokens were given
        assert sequence.imbalance == pytest.approx(toy.sigma(sequence.input_ids), rel=1e-5)
        for branch, ids in enumerate(search.input_ids[row].tolist()):
            total = sum(toy.log_probs(ids)[1:])
            assert search.log_prob[row, branch].item() == pytest.approx(total, rel=1e-5)


def test_less_imbalance_is_better():
    mean = {}
    for tau in (math.inf, 0.05):
        sequences = [
            Toy(8, seed).search(config(seq_len=16, tau=tau), [[0]])[1] for seed in range(8)
        ]
        mean[tau] = statistics.fmean(found.imbalance for [found] in sequences)
    assert mean[0.05] < 0.6 * mean[math.inf]


def test_a_base_is_balanced_by_what_it_lacks():
    toy = Toy(8, 3)
    base = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    base[:, 0], base[:, 1:] = 90, 30
    options = {"base_load": base, "base_tokens": 90}
    _, [alone] = toy.search(config(tau=0.02, seq_len=16), [[0]])
    _, [together] = toy.search(config(tau=0.02, seq_len=16), [[0]], **options)

    def of_all(sequence):
        return expert_imbalance(base + torch.tensor(sequence.load), 106)

    assert of_all(together) < of_all(alone)
    assert together.imbalance == pytest.approx(toy.sigma(together.input_ids), rel=1e-5)


def test_a_base_does_not_lengthen_branches_that_leave_its_imbalance_as_it_is():
    toy = Toy(6, 0)
    toy.load[:] = 1  # every token to all experts alike
    base = {"base_load": torch.tensor([[90, 0, 0, 0]] * LAYERS), "base_tokens": 45}
    ends = {"config": config(min_length=3, tau=0.1), "start": [[0]], "end": 5}
    assert toy.search(**ends)[1] == toy.search(**ends, **base)[1]
    assert len(toy.search(**ends)[1][0].input_ids) < 8  # or there is nothing to lengthen


def test_an_empty_base_changes_nothing():
    toy = Toy(6, 2)
    empty = {"base_load": torch.zeros(LAYERS, EXPERTS, dtype=torch.int64), "base_tokens": 0}
    assert toy.search(config(tau=0.1), [[1]])[1] == toy.search(config(tau=0.1), [[1]], **empty)[1]


class TestTokens:
    def test_blocked_ids_never_appear(self):
        _, found = Toy(6, 0).search(config(prefix_tokens=3), [[0], [1]], blocked=[2, 4])
        assert not {2, 4} & {token for sequence in found for token in sequence.input_ids}

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_no_ngram_comes_twice(self, size):
        _, found = Toy(20, 0).search(
            config(seq_len=16, no_repeat_ngram=size, prefix_tokens=4), [[0], [1]]
        )
        for sequence in found:
            grams = list(zip(*(sequence.input_ids[i:] for i in range(size)), strict=False))
            assert len(set(grams)) == len(grams)

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
    @settings(derandomize=True, deadline=None)
    def test_ngrams_are_found_as_a_loop_finds_them(self, ids, size):
        if len(ids) < size:
            return
        old = {tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)}
        tail = tuple(ids[len(ids) - size + 1 :])
        expected = [(*tail, token) in old for token in range(4)]
        assert completes_old_ngram(torch.tensor(ids), size, 4).tolist() == expected

    def test_prefix_is_drawn_from_the_model_and_not_guided(self):
        toy, drawn = Toy(4, 5), []
        for chance in torch.linspace(0, 0.999, 200):
            search = BeamSearch(torch.tensor([[1]]), [0], config(tau=1e-9))
            extension = search.sample(*toy.after(torch.tensor([[1]]), 0), chance[None])
            drawn.append(int(extension.tokens))
        shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
        torch.testing.assert_close(shares, toy.logits[0, 1].softmax(-1), atol=0.011, rtol=0)

    def test_a_branch_may_end_from_min_length_on(self):
        toy = Toy(6, 0)
        toy.logits[..., 5] += 9  # the end is likely everywhere
        settings_ = config(seq_len=10, min_length=4, tau=math.inf)
        _, [found] = toy.search(settings_, [[0]], end=5)
        assert len(found.input_ids) == 4
        assert found.input_ids[-1] == 5
        assert torch.equal(torch.tensor(found.load), toy.load[found.input_ids].sum(0))

    def test_an_ended_branch_loses_against_a_better_longer_one(self):
        toy = Toy(4, 0)
        toy.logits.fill_(-9.0)
        toy.logits[..., 1] = 0.0  # one token after the other is certain, the end is not
        settings_ = config(seq_len=8, min_length=2, tau=math.inf)
        _, [found] = toy.search(settings_, [[0]], end=3)
        assert found.input_ids == [0] + [1] * 7

    def test_without_end_every_length_is_exact(self):
        _, found = Toy(6, 0).search(config(seq_len=11), [[0], [1]])
        assert {len(sequence.input_ids) for sequence in found} == {11}


class TestExtension:
    @given(
        st.integers(1, 6).flatmap(lambda w: st.lists(st.integers(0, w - 1), min_size=w, max_size=w))
    )
    @settings(derandomize=True, deadline=None)
    def test_every_branch_that_goes_on_keeps_its_place(self, parents):
        parents = torch.tensor([parents])
        order = stay_in_place(parents)
        assert order.sort().values.tolist() == [list(range(parents.shape[1]))]
        arranged = parents.gather(1, order)[0].tolist()
        assert all(arranged[parent] == parent for parent in set(arranged))

    def test_shared_tokens_are_those_that_old_and_new_have_in_common(self):
        toy, tokens = Toy(6, 4), torch.tensor([[0], [3]])
        search = BeamSearch(tokens, [0, 1], config(seq_len=12))
        extension = search.advance(*toy.after(tokens, 0))
        moved = 0
        while not search.is_done:
            old = search.input_ids
            extension = search.advance(*toy.after(extension.tokens, old.shape[2] - 1))
            for row, branch in itertools.product(range(2), range(4)):
                parent = old[row, extension.parents[row, branch]].tolist()
                pairs = zip(parent, old[row, branch].tolist(), strict=True)
                common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
                assert extension.shared_tokens[row, branch] == common
                assert search.input_ids[row, branch, :-1].tolist() == parent
                moved += common < extension.length
        assert moved


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "overflow"])
def test_logits_that_are_not_finite_stop_the_search_and_name_the_sequence(bad):
    toy = Toy(6, 0)
    tokens = torch.tensor([[0], [1]])
    search = BeamSearch(tokens, [17, 23], config())
    logits, load = toy.after(tokens, 0)
    logits[1, 0, 2] = bad
    with pytest.raises(ValueError, match=r"not finite after 1 tokens of sequences \[23\]"):
        search.advance(logits, load)


def test_a_vocabulary_that_is_used_up_is_an_error():
    with pytest.raises(ValueError, match=r"no token was left to continue sequences \[0\]"):
        Toy(4, 0).search(config(no_repeat_ngram=1), [[0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"seq_len": 1}, "seq_len must be at least 2: a start token and one to predict, got 1"),
        ({"beam_width": 0}, r"beam_width must be at least 1 \(1 is greedy\), got 0"),
        ({"tau": 0}, "tau must be None or positive .* got 0"),
        ({"tau": -1.0}, "tau must be None or positive .* got -1.0"),
        ({"tau": math.nan}, "tau must be None or positive .* got nan"),
        ({"tau": None, "global_balance": True}, "global_balance must be False without tau"),
        ({"prefix_tokens": 8}, r"prefix_tokens must be 0 to 7 \(seq_len - 1\), got 8"),
        ({"prefix_tokens": -1}, "prefix_tokens must be 0 to 7 .* got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be None or at least 1, got 0"),
        ({"min_length": 9}, r"min_length must be None or 2 to 8 \(seq_len\), got 9"),
        ({"min_length": 1}, "min_length must be None or 2 to 8"),
        ({"min_expert_tokens": 0}, "min_expert_tokens must be None or positive, got 0"),
    ],
    ids=str,
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="beam_width must be .*; tau must be"):
        EBSSConfig(beam_width=0, tau=0)
