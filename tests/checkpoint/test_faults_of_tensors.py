"""Numbers, names and tensors that are wrong whatever the source is."""

import pytest
import torch
from planted import ATTENTION, EXPERT, Planted, assert_found, every, ids, section, tensor, tensors

GATE, ROUTER = f"{EXPERT}.gate_proj", "model.layers.0.mlp.gate.weight"


def full(value):
    return lambda t: torch.full_like(t, value)


def rows(value, step=2):
    def change(t):
        t[::step] = value
        return t

    return change


def row(number, value):
    def change(t):
        t[number] = value
        return t

    return change


def same_rows(t):
    t[1] = t[0]
    return t


def copy(one, other, *suffixes):
    def on(found):
        for name in [n for n in found if n.startswith(one) and n.endswith(suffixes or ("",))]:
            found[other + name.removeprefix(one)] = found[name].clone()

    return tensors(on)


def rename(one, other):
    def on(found):
        for name in [name for name in found if one in name]:
            found[name.replace(one, other)] = found.pop(name)

    return tensors(on)


def add(name, value):
    return tensors(lambda found: found.__setitem__(name, value))


def remove(part):
    return tensors(lambda found: [found.pop(name) for name in list(found) if part in name])


VALUES = [
    Planted("norm of zeros", tensor("model.norm.weight", torch.zeros_like), ("zeroed",)),
    Planted(
        "norm of a layer of zeros",
        tensor("model.layers.1.input_layernorm.weight", torch.zeros_like),
        ("zeroed",),
    ),
    Planted(
        "norm of queries of zeros",
        tensor(f"{ATTENTION}.q_norm.weight", torch.zeros_like),
        ("zeroed",),
    ),
    Planted("norm half zero", tensor("model.norm.weight", rows(0)), ("zeroed",)),
    Planted("all norms of zeros", every("norm.weight", torch.zeros_like), ("zeroed",)),
    Planted("norm beyond all", tensor("model.norm.weight", full(1e30)), ("magnitude",)),
    Planted("norm denormal", tensor("model.norm.weight", full(1e-38)), ("magnitude",)),
    Planted("router row of zeros", tensor(ROUTER, row(1, 0)), ("router-rows",)),
    Planted("two equal router rows", tensor(ROUTER, same_rows), ("router-rows",)),
    Planted(
        "router row beyond the others",
        tensor(ROUTER, lambda t: torch.cat([t[:1] * 1e5, t[1:]])),
        ("router-rows",),
    ),
    Planted(
        "router of another layer",
        copy("model.layers.0.mlp.gate.", "model.layers.1.mlp.gate."),
        ("duplicate-weight",),
    ),
    Planted("router of NaN", tensor(ROUTER, row(1, float("nan"))), ("non-finite",)),
    Planted(
        "layer written twice", copy("model.layers.0.", "model.layers.1."), ("duplicate-layer",)
    ),
    Planted(
        "attention written twice",
        copy("model.layers.0.self_attn.", "model.layers.1.self_attn."),
        ("duplicate-layer",),
    ),
    Planted(
        "experts written twice",
        copy("model.layers.0.mlp.experts.", "model.layers.1.mlp.experts."),
        ("duplicate-layer",),
    ),
    Planted(
        "queries written twice",
        copy(f"{ATTENTION}.q_proj.", "model.layers.1.self_attn.q_proj."),
        ("duplicate-weight",),
    ),
    Planted(
        "gate written over up",
        copy(f"{EXPERT}.gate_proj.", f"{EXPERT}.up_proj."),
        ("duplicate-weight",),
    ),
    Planted(
        "denormal scales",
        tensor(f"{GATE}.weight_scale", full(1e-41)),
        ("magnitude", "scale-not-positive"),
    ),
    Planted("huge scales", tensor(f"{GATE}.weight_scale", full(3e38)), ("magnitude",)),
    Planted(
        "denormal scales of all",
        every("weight_scale", full(1e-41)),
        ("magnitude", "scale-not-positive"),
    ),
    Planted("a huge scale", tensor(f"{GATE}.weight_scale", row(0, 3e38)), ("magnitude",)),
    Planted("half of the rows dead", tensor(f"{GATE}.weight_scale", rows(1e-30)), ("dead-rows",)),
    Planted(
        "half of the rows denormal",
        tensor(f"{EXPERT}.down_proj.weight_scale", rows(1e-12)),
        ("dead-rows",),
    ),
    Planted(
        "codes of half of the rows",
        tensor(f"{EXPERT}.down_proj.weight_packed", rows(-0x77777778)),
        ("dead-rows",),
    ),
    Planted(
        "half of the columns",
        tensor(
            f"{GATE}.weight_packed",
            lambda t: torch.cat([t[:, :4], torch.full_like(t[:, 4:], -0x77777778)], 1),
        ),
        ("dead-rows",),
    ),
    Planted(
        "half of the embedding dead", tensor("model.embed_tokens.weight", rows(0)), ("dead-rows",)
    ),
    Planted(
        "a quarter of the embedding dead",
        tensor("model.embed_tokens.weight", rows(0, 4)),
        ("dead-rows",),
    ),
    Planted("half of the output embedding dead", tensor("lm_head.weight", rows(0)), ("dead-rows",)),
    Planted(
        "embedding beyond all",
        tensor("model.embed_tokens.weight", lambda t: t * 1e20),
        ("magnitude",),
    ),
    Planted(
        "16-bit expert half dead",
        tensor("model.layers.1.mlp.experts.0.up_proj.weight", rows(0)),
        ("dead-rows",),
        "a layer in 16 bit",
    ),
    Planted(
        "zero points at 0",
        every("weight_zero_point", torch.zeros_like),
        ("zero-point",),
        "asymmetric",
    ),
    Planted(
        "zero points at 15",
        tensor(f"{GATE}.weight_zero_point", full(-1)),
        ("zero-point",),
        "asymmetric",
    ),
]
NAMES = [
    Planted(
        "names of Mixtral", rename(".mlp.experts.", ".block_sparse_moe.experts."), ("foreign-name",)
    ),
    Planted(
        "a router called as Mixtral's",
        rename(".mlp.gate.", ".block_sparse_moe.gate."),
        ("foreign-name",),
    ),
    Planted("names of others", rename(".block_sparse_moe.", ".mlp."), ("foreign-name",), "mixtral"),
    Planted(
        "projections of Mixtral",
        tensors(
            lambda f: [
                f.__setitem__(n.replace("gate_proj", "w1"), f.pop(n))
                for n in list(f)
                if ".experts." in n and "gate_proj" in n
            ]
        ),
        ("foreign-name",),
    ),
    Planted(
        "two spellings",
        tensors(
            lambda f: [
                f.__setitem__(n.replace("mlp", "block_sparse_moe"), f[n].clone())
                for n in list(f)
                if n.startswith(f"{EXPERT}.")
            ]
        ),
        ("two-names",),
    ),
    Planted(
        "two spellings of a router",
        add("model.layers.0.mlp.gate.weight", torch.randn(4, 64)),
        ("two-names", "foreign-name"),
        "mixtral",
    ),
    Planted(
        "prefix lost", rename("model.layers.", "layers."), ("missing-tensor", "missing-expert")
    ),
    Planted(
        "another prefix",
        rename("model.layers.", "transformer.h."),
        ("missing-tensor", "missing-expert"),
    ),
    Planted("a layer too many", copy("model.layers.1.", "model.layers.2."), ("unexpected-tensor",)),
    Planted(
        "numbers of layers from 1",
        tensors(
            lambda f: [
                f.__setitem__(n.replace("layers.1.", "layers.2."), f.pop(n))
                for n in list(f)
                if "layers.1." in n
            ]
        ),
        ("unexpected-tensor", "missing-tensor"),
    ),
    Planted("norms lost", remove("layernorm"), ("missing-tensor",)),
    Planted("embedding lost", remove("embed_tokens"), ("missing-tensor",)),
    Planted("output embedding lost", remove("lm_head"), ("missing-tensor",)),
    Planted("shape lost", remove(f"{GATE}.weight_shape"), ("missing-tensor",)),
    Planted("bias lost", remove(f"{ATTENTION}.q_proj.bias"), ("missing-tensor",), "qwen2_moe"),
    Planted(
        "shared expert lost",
        remove("layers.1.mlp.shared_expert."),
        ("missing-tensor",),
        "qwen2_moe",
    ),
    Planted(
        "order of columns",
        add(f"{GATE}.weight_g_idx", torch.arange(64) // 16),
        ("unexpected-tensor",),
    ),
    Planted(
        "scales of 16-bit linears",
        add("lm_head.weight_scale", torch.ones(128, 1)),
        ("unexpected-tensor",),
    ),
]
TURNED = [
    Planted("codes transposed", tensor(f"{GATE}.weight_packed", lambda t: t.T), ("transposed",)),
    Planted("scales transposed", tensor(f"{GATE}.weight_scale", lambda t: t.T), ("transposed",)),
    Planted(
        "GPTQ codes transposed",
        tensor(f"{GATE}.qweight", lambda t: t.T),
        ("transposed",),
        "GPTQ format",
    ),
    Planted(
        "GPTQ scales transposed",
        tensor(f"{GATE}.scales", lambda t: t.T),
        ("transposed",),
        "GPTQ format",
    ),
    Planted("router transposed", tensor(ROUTER, lambda t: t.T), ("transposed",)),
]
FORMAT = [
    Planted(
        "groups out of order", every("g_idx", lambda t: t.flip(0)), ("group-index",), "GPTQ format"
    ),
    Planted(
        "groups of one linear",
        tensor(f"{GATE}.g_idx", lambda t: t.roll(1)),
        ("group-index",),
        "GPTQ format",
    ),
    Planted(
        "groups of zeros",
        tensor(f"{GATE}.g_idx", torch.zeros_like),
        ("group-index",),
        "GPTQ format",
    ),
    Planted(
        "groups of another size", every("g_idx", lambda t: t // 2), ("group-index",), "GPTQ format"
    ),
    Planted(
        "uneven groups with act order",
        lambda path: (
            section(desc_act=True)(path),
            tensor(f"{GATE}.g_idx", torch.zeros_like)(path),
        ),
        ("group-index",),
        "GPTQ format",
    ),
    Planted(
        "act order without groups",
        lambda path: (section(desc_act=True)(path), remove("g_idx")(path)),
        ("group-index",),
        "GPTQ format",
    ),
    Planted(
        "version 2 said to be 1", every("qzeros", full(-0x77777778)), ("zero-point",), "GPTQ format"
    ),
    Planted(
        "version 1 said to be 2",
        section(checkpoint_format="gptq_v2"),
        ("zero-point",),
        "GPTQ format",
    ),
    Planted(
        "zero points of zeros", every("qzeros", torch.zeros_like), ("zero-point",), "GPTQ format"
    ),
    Planted(
        "some zero points",
        tensor(f"{GATE}.qzeros", row(0, 0x12345678)),
        ("zero-point",),
        "GPTQ format",
    ),
    Planted("other bits", section(bits=8), ("scheme-mismatch", "wrong-shape"), "GPTQ format"),
    Planted(
        "another group size",
        section(group_size=32),
        ("scheme-mismatch", "wrong-shape", "group-index"),
        "GPTQ format",
    ),
    Planted(
        "no group size",
        section(group_size=-1),
        ("scheme-mismatch", "wrong-shape", "group-index"),
        "GPTQ format",
    ),
]
ALL = [*VALUES, *NAMES, *TURNED, *FORMAT]


@pytest.mark.parametrize("fault", ALL, ids=ids(ALL))
def test_what_is_wrong_by_itself_is_found_without_a_source(fault, sound, tmp_path):
    assert_found(fault, sound, tmp_path)


@pytest.mark.parametrize("fault", TURNED, ids=ids(TURNED))
def test_a_transposed_tensor_is_told_as_one_thing(fault, sound, tmp_path):
    from checkpoints import copy_of

    from moeq_plugin import verify_checkpoint

    path = copy_of(sound(fault.of), tmp_path / "out")
    fault.damage(path)
    assert [found.check for found in verify_checkpoint(path).errors] == ["transposed"]
