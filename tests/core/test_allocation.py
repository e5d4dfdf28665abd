import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeq_plugin.core.allocation import (
    Allocation,
    BitBudget,
    InfeasibleBudgetError,
    achievable_bytes,
    allocate_bits,
    pareto_front,
)
from moeq_plugin.core.sensitivity import SensitivityTable

seeds = st.integers(0, 2**31)


def small_table(seed, *, domains=1):
    """Return up to 7 rows in up to 4 units, some options forbidden, one common to a unit."""
    rng = np.random.default_rng(seed)
    rows, options = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    unit = rng.integers(0, 4, rows)
    shape = (domains, rows, options)
    loss = rng.integers(0, 5, shape) if seed % 2 else 10.0 ** rng.uniform(-6, 2, shape)
    loss = loss.astype(np.float64)
    common = rng.integers(0, options, 4)  # every unit keeps one option
    forbidden = rng.random(shape) < 0.1
    forbidden[:, np.arange(rows), common[unit]] = False
    loss[forbidden] = np.inf
    return SensitivityTable(
        rows=tuple(f"row{i}" for i in range(rows)),
        options=tuple(f"option{i}" for i in range(options)),
        domains=tuple(f"domain{i}" for i in range(domains)),
        loss=loss,
        num_bytes=rng.integers(1, 40, (rows, options)) * int(rng.choice([1, 16])),
        num_weights=rng.integers(8, 200, rows),
        units={"vllm": tuple(f"unit{u}" for u in unit), "expert": tuple(map(str, range(rows)))},
        fixed_bytes=int(rng.integers(0, 100)),
    )


def example_table():
    """Return two layers of two linears, at 2 and 4 bits; losses a person can add up."""
    return SensitivityTable(
        rows=("0.up", "0.down", "1.up", "1.down"),
        options=("w2", "w4"),
        domains=("text",),
        loss=np.array([[[4.0, 1.0], [4.0, 1.0], [3.0, 0.5], [9.0, 0.5]]]),
        num_bytes=np.array([[250, 500]] * 4) * 1000,
        num_weights=np.full(4, 1_000_000),
        units={"vllm": ("0", "0", "1", "1"), "gguf": ("0.up", "0.down", "1.up", "1.down")},
        fixed_bytes=100_000,
    )


def every_choice(table, target):
    """Yield (option of each row, bytes, loss of each domain) of every allowed choice."""
    units = list(dict.fromkeys(table.units[target]))
    for options in itertools.product(range(len(table.options)), repeat=len(units)):
        option = [options[units.index(unit)] for unit in table.units[target]]
        chosen = list(enumerate(option))
        losses = [sum(loss[r, o] for r, o in chosen) for loss in table.loss]
        if math.inf not in losses:
            yield option, sum(int(table.num_bytes[r, o]) for r, o in chosen), losses


def budget_of(table, num_bytes):
    return BitBudget(bits_per_weight=8 * num_bytes / int(table.num_weights.sum()))


def some_limit(table, target, seed):
    """Return bytes that some choice takes, or one more or one less, as long as any is possible."""
    rng = np.random.default_rng(seed)
    sizes = sorted(size for _, size, _ in every_choice(table, target))
    return max(int(rng.choice(sizes)) + int(rng.integers(-1, 2)), sizes[0])


def found_option(table, allocation):
    return [table.options.index(allocation.choice[row]) for row in table.rows]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(seeds, st.integers(1, 3), st.sampled_from(["vllm", "expert"]))
def test_equals_brute_force(seed, domains, target):
    table = small_table(seed, domains=domains)
    assume(len(set(table.units[target])) <= 5)
    limit = some_limit(table, target, seed)

    found = allocate_bits(table, budget_of(table, limit), target=target)

    choices = list(every_choice(table, target))
    best = min(sum(losses) / domains for _, size, losses in choices if size <= limit)
    option = found_option(table, found)
    size, losses = next((size, losses) for o, size, losses in choices if o == option)
    assert found.limit_bytes == limit
    assert found.num_bytes == size <= limit
    assert list(found.losses.values()) == pytest.approx(losses, rel=1e-12)
    assert found.value == pytest.approx(sum(losses) / domains, rel=1e-12)
    assert found.value == pytest.approx(best, rel=1e-12)
    assert found.gap == 0
    assert found.bits_per_weight == 8 * size / table.num_weights.sum()
    assert list(found.reasons) == list(dict.fromkeys(table.units[target]))


def reference_losses(table, limit, additive):
    """Return each domain's loss at its best uniform option within the limit."""
    rows = range(len(table.rows))
    uniform = [
        [sum(loss[r, o] for r in rows) for loss in table.loss]
        for o in range(len(table.options))
        if sum(int(table.num_bytes[r, o]) for r in rows) <= limit
        and np.isfinite(table.loss[:, :, o]).all()
    ]
    return [min(column) for column in zip(*uniform, strict=True)] or list(additive.losses.values())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(seeds, st.integers(1, 3))
def test_robust_equals_brute_force(seed, domains):
    table = small_table(2 * (seed // 2), domains=domains)  # even: no losses of zero
    limit = some_limit(table, "vllm", seed)
    budget = budget_of(table, limit)

    found = allocate_bits(table, budget, robust=True)

    reference = reference_losses(table, limit, allocate_bits(table, budget))
    best = min(
        max(loss / r for loss, r in zip(losses, reference, strict=True))
        for _, size, losses in every_choice(table, "vllm")
        if size <= limit
    )
    worst = max(loss / r for loss, r in zip(found.losses.values(), reference, strict=True))
    assert found.robust
    assert found.price is None
    assert found.num_bytes <= limit
    assert found.value == pytest.approx(worst, rel=1e-9)
    assert found.value == pytest.approx(best, rel=1e-6)  # the tolerance asked of HiGHS
    assert found.bound <= best * (1 + 1e-6)
    assert found.gap <= 1e-6


def test_robust_helps_the_domain_that_the_mean_sacrifices():
    # only layer 0 matters to text and only layer 1 to code, but text loses twenty times as much
    text = [[40.0, 1.0], [40.0, 1.0], [1.0, 0.5], [1.0, 0.5]]
    code = [[0.1, 0.1], [0.1, 0.1], [2.0, 0.1], [2.0, 0.1]]
    table = replace(example_table(), domains=("text", "code"), loss=np.array([text, code]))
    budget = BitBudget(bits_per_weight=3.1)  # one layer of two at 4 bits

    mean, robust = allocate_bits(table, budget), allocate_bits(table, budget, robust=True)

    assert mean.losses == pytest.approx({"text": 1 + 1 + 1 + 1, "code": 0.1 + 0.1 + 2 + 2})
    assert robust.losses == pytest.approx({"text": 40 + 40 + 0.5 + 0.5, "code": 4 * 0.1})
    assert robust.value == pytest.approx(81 / 82)  # text; uniform 2 bits lose 82


def test_robust_refuses_a_reference_without_loss():
    table = replace(
        example_table(), domains=("text", "code"), loss=np.tile(example_table().loss, (2, 1, 1))
    )
    table.loss[1] = 0
    with pytest.raises(ValueError, match=r"the reference loses nothing in \['code'\]"):
        allocate_bits(table, BitBudget(3.0), robust=True)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seeds)
def test_more_bytes_never_lose_more(seed):
    table = small_table(seed)
    low, high = achievable_bytes(table)
    budgets = [budget_of(table, size) for size in range(low, high + 2, max(1, (high - low) // 12))]

    front = pareto_front(table, budgets)

    assert [a.budget for a in front] == budgets
    values = [a.value for a in front]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values))
    assert all(a.num_bytes <= a.limit_bytes for a in front)
    assert front[3 % len(front)] == allocate_bits(table, budgets[3 % len(front)])


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seeds, st.sampled_from([2.0**-40, 8.0, 1e7]))
def test_scaling_the_losses_scales_the_value(seed, factor):
    table = small_table(seed)
    budget = budget_of(table, some_limit(table, "vllm", seed))

    found = allocate_bits(table, budget)
    scaled = allocate_bits(replace(table, loss=table.loss * factor), budget)

    assert scaled.value == pytest.approx(found.value * factor, rel=1e-12)
    assert scaled.price == pytest.approx(found.price * factor, rel=1e-9)
    if math.log2(factor).is_integer():  # no rounding, so not even a tie may fall differently
        assert scaled.choice == found.choice


@settings(derandomize=True, max_examples=40, deadline=None)
@given(seeds)
def test_order_of_rows_and_options_does_not_matter(seed):
    table = small_table(2 * (seed // 2))  # even: no ties
    rng = np.random.default_rng(seed)
    rows, options = rng.permutation(len(table.rows)), rng.permutation(len(table.options))
    shuffled = SensitivityTable(
        rows=tuple(table.rows[i] for i in rows),
        options=tuple(table.options[i] for i in options),
        domains=table.domains,
        loss=table.loss[:, rows][:, :, options],
        num_bytes=table.num_bytes[rows][:, options],
        num_weights=table.num_weights[rows],
        units={"vllm": tuple(table.units["vllm"][i] for i in rows)},
    )
    budget = budget_of(table, some_limit(table, "vllm", seed))

    assert allocate_bits(shuffled, budget).choice == allocate_bits(table, budget).choice


def test_rows_of_a_unit_share_what_all_of_them_allow():
    table = example_table()
    assert allocate_bits(table, BitBudget(3.1)).choice == {
        "0.up": "w2", "0.down": "w2", "1.up": "w4", "1.down": "w4"
    }  # fmt: skip
    assert allocate_bits(table, BitBudget(3.1), target="gguf").value == 1 + 4 + 3 + 0.5
    table.loss[0, 2, 1] = math.inf
    assert allocate_bits(table, BitBudget(3.1)).choice["0.up"] == "w4"
    table.loss[0, 3, 0] = math.inf
    with pytest.raises(ValueError, match=r"no option is allowed for all rows of \['1'\]"):
        allocate_bits(table, BitBudget(3.1))


def test_reasons_name_the_trade_and_the_price():
    table = example_table()
    found = allocate_bits(table, BitBudget(3.1))
    # the hull steps are 11 nats for 0.5 MB, taken, and 6 nats for 0.5 MB, which did not fit
    assert found.price == pytest.approx(6 / 500_000)
    assert found.reasons == {
        "0": "w2: w4 would take 0.5 MB and save 6 nats, 1 times what those bytes save elsewhere.",
        "1": "w4: w2 would save 0.5 MB and cost 11 nats, 1.83 times what those bytes save "
        "elsewhere.",
    }
    roomy = allocate_bits(table, BitBudget(16.0))
    assert roomy.price == 0
    assert roomy.reasons["0"] == (
        "w4: w2 would save 0.5 MB and cost 6 nats; the budget does not bind."
    )
    only = replace(
        table, options=("w4",), loss=table.loss[..., 1:], num_bytes=table.num_bytes[:, 1:]
    )
    assert allocate_bits(only, BitBudget(4.0)).reasons["0"].startswith("w4: no other option")


def test_a_budget_counts_rows_in_bits_and_the_checkpoint_in_gigabytes():
    table = example_table()
    assert BitBudget(bits_per_weight=3.0).limit_bytes(table) == 1_500_000
    assert BitBudget(bits_per_weight=2.999999).limit_bytes(table) == 1_499_999
    assert BitBudget(size_gb=0.0016).limit_bytes(table) == 1_500_000
    assert BitBudget(size_gb=0.000000123).limit_bytes(table) == 123 - 100_000


@settings(derandomize=True, max_examples=200)
@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_reported_sizes_are_budgets_that_give_the_same_bytes(num_bytes, num_weights):
    table = replace(example_table(), num_weights=np.array([num_weights - 1, 1, 0, 0]))
    assert budget_of(table, num_bytes).limit_bytes(table) == num_bytes
    size = BitBudget(size_gb=(num_bytes + table.fixed_bytes) / 1e9)
    assert size.limit_bytes(table) == num_bytes


@pytest.mark.parametrize("unit", ["bits_per_weight", "size_gb"])
@settings(derandomize=True, max_examples=40, deadline=None)
@given(seed=seeds)
def test_an_infeasible_budget_says_what_is_achievable(unit, seed):
    table = small_table(seed)
    sizes = [size for _, size, _ in every_choice(table, "vllm")]
    assert achievable_bytes(table) == (min(sizes), max(sizes))

    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate_bits(table, BitBudget(**{unit: 1e-9}))

    words = str(caught.value).split()
    low, high = float(words[words.index("from") + 1]), float(words[words.index("to") + 1])
    smallest = allocate_bits(table, BitBudget(**{unit: low}))
    assert smallest.num_bytes == min(sizes)
    assert BitBudget(**{unit: high}).limit_bytes(table) >= max(sizes)
    step = 1e-6 if unit == "bits_per_weight" else 1e-9
    if low > step:
        with pytest.raises(InfeasibleBudgetError):
            allocate_bits(table, BitBudget(**{unit: low - 1.01 * step}))


def test_an_infeasible_budget_is_told_in_its_own_unit():
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"a budget of 1.5 is too small: for target 'vllm' the options reach from 2.0 to 4.0 "
        r"bits per weight; raise the budget or add a smaller option",
    ):
        allocate_bits(example_table(), BitBudget(1.5))
    with pytest.raises(
        InfeasibleBudgetError,
        match=r"reach from 0.0011 to 0.0021 GB, of which 0.0001 GB are not quantized; raise",
    ):
        allocate_bits(example_table(), BitBudget(size_gb=0.001))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "give exactly one of bits_per_weight and size_gb, got None and None"),
        ({"bits_per_weight": 3.0, "size_gb": 1.0}, "exactly one .* got 3.0 and 1.0"),
        ({"bits_per_weight": 0.0}, "must be positive and finite, got 0.0"),
        ({"size_gb": -1.0}, "must be positive and finite, got -1.0"),
        ({"size_gb": math.inf}, "must be positive and finite, got inf"),
        ({"bits_per_weight": math.nan}, "must be positive and finite, got nan"),
    ],
    ids=["none", "both", "zero", "negative", "infinite", "nan"],
)
def test_refuses_a_budget(given_, message):
    with pytest.raises(ValueError, match=message):
        BitBudget(**given_)


def test_refuses_an_unknown_target():
    with pytest.raises(ValueError, match=r"has units for \['gguf', 'vllm'\], not for 'expert'"):
        allocate_bits(example_table(), BitBudget(3.0), target="expert")


@pytest.mark.parametrize("robust", [False, True], ids=["mean", "robust"])
@pytest.mark.parametrize("budget", [BitBudget(3.1), BitBudget(size_gb=0.002)], ids=["bits", "gb"])
def test_an_allocation_survives_its_file(tmp_path, budget, robust):
    found = allocate_bits(example_table(), budget, robust=robust)
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json") == found


def allocation(**changes):
    return replace(allocate_bits(example_table(), BitBudget(3.1)), **changes)


def test_the_gap_is_relative():
    assert allocation(value=4.0, bound=3.0).gap == 0.25
    assert allocation(value=0.0, bound=0.0).gap == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bytes": 8, "limit_bytes": 7}, "8 bytes exceed the limit of 7"),
        ({"bound": 9.0, "value": 8.0}, "expected 0 <= bound <= value, got 9.0 and 8.0"),
        ({"bound": -1.0}, "expected 0 <= bound <= value, got -1.0"),
        ({"value": math.inf}, "expected 0 <= bound <= value, got .* and inf"),
        ({"value": math.nan}, "expected 0 <= bound <= value, got .* and nan"),
    ],
    ids=["over-budget", "bound-above", "negative-bound", "infinite", "nan"],
)
def test_refuses_an_allocation(changes, message):
    with pytest.raises(ValueError, match=message):
        allocation(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("schema_version"), "'schema_version'$"),
        (lambda c: c.update(schema_version=2), "schema version 2, expected 1"),
        (lambda c: c.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda c: c.pop("choice"), "missing 1 required positional argument: 'choice'"),
        (lambda c: c["budget"].update(size_gb=1.0), "give exactly one"),
        (lambda c: c.update(limit_bytes=1), "exceed the limit of 1"),
    ],
    ids=["no-version", "version", "extra", "missing", "budget", "over-budget"],
)
def test_refuses_a_file(tmp_path, change, message):
    path = tmp_path / "a.json"
    allocation().save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"a.json is not an allocation: .*{message}"):
        Allocation.load(path)


def test_refuses_a_file_that_is_no_object(tmp_path):
    for text in ("[]", "{", "3"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="a.json is not an allocation"):
            Allocation.load(tmp_path / "a.json")


def test_reasons_name_the_nearest_options_that_are_a_trade():
    table = SensitivityTable(
        rows=("up",),
        options=("w2", "w3", "w4", "w5 but worse", "w6", "w8"),
        domains=("text",),
        loss=np.array([[[9.0, 4.0, 1.0, 2.0, 0.5, 0.1]]]),
        num_bytes=np.array([[2, 3, 4, 5, 6, 8]]) * 10**6,
        num_weights=np.array([8 * 10**6]),
        units={"vllm": ("up",)},
    )
    assert allocate_bits(table, BitBudget(4.5), robust=True).reasons["up"] == (
        "w4: w3 would save 1 MB and cost 3 nats; w6 would take 2 MB and save 0.5 nats."
    )
