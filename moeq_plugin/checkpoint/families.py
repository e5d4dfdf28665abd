"""The architectures that we know from their config: one entry each in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moeq_plugin.checkpoint.architecture import Architecture, Linear, Role
from moeq_plugin.checkpoint.config import EXPERT_KEYS, Config

_MAX_LAYERS, _MAX_EXPERTS, _MAX_EXPERTS_IN_ALL = 1024, 4096, 1 << 17


@dataclass(frozen=True)
class Family:
    """How an architecture differs from the others, beyond numbers in its config.

    Attributes:
        experts_are_as_wide_as: the config's key for the width of an expert.
        latent_attention: DeepSeek's, with low-rank queries, keys and values.
        router: name of the router.
        router_bias: name of a bias beside the router's weight.
        shared: name of the shared expert, ``None`` where there is none.
        is_gated: whether a linear gates the shared expert.
        qk_norm: ``head`` if one head, ``full`` if all heads are normalized at once.
        qkv_bias: biases of q, k and v: always, never, or as the config says under a key.
        has_biases: attention's output, router and experts have biases, and heads have sinks.
        counts_dense_layers: config lists dense layers as DeepSeek's or as Qwen's does.
    """

    experts_are_as_wide_as: str = "moe_intermediate_size"
    latent_attention: bool = False
    router: str = "gate"
    router_bias: str | None = None
    shared: str | None = None
    is_gated: bool = False
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool | str = False
    has_biases: bool = False
    counts_dense_layers: Literal["first", "sparse_step"] | None = None


FAMILIES = {
    "mixtral": Family(experts_are_as_wide_as="intermediate_size"),
    "olmoe": Family(
        experts_are_as_wide_as="intermediate_size", qk_norm="full", qkv_bias="attention_bias"
    ),
    "qwen2_moe": Family(
        shared="shared_expert",
        is_gated=True,
        qkv_bias="qkv_bias",
        counts_dense_layers="sparse_step",
    ),
    "qwen3_moe": Family(
        qk_norm="head", qkv_bias="attention_bias", counts_dense_layers="sparse_step"
    ),
    "deepseek_v2": Family(
        latent_attention=True, shared="shared_experts", counts_dense_layers="first"
    ),
    "deepseek_v3": Family(
        latent_attention=True,
        shared="shared_experts",
        router_bias="e_score_correction_bias",
        counts_dense_layers="first",
    ),
    "gpt_oss": Family(
        experts_are_as_wide_as="intermediate_size",
        router="router",
        router_bias="bias",
        qkv_bias=True,
        has_biases=True,
    ),
}


def architecture_of(config: Config) -> Architecture:
    """Return names and shapes of everything that a model of a known family consists of.

    Raises:
        ValueError: if a number is missing from the config or cannot be one.
    """
    return _Builder(config, FAMILIES[config.family]).build()


class _Builder:
    """Collects a model's linears and other tensors, layer by layer."""

    def __init__(self, config: Config, family: Family) -> None:
        self.config, self.family = config, family
        self.num_layers = config.size("num_hidden_layers", high=_MAX_LAYERS)
        self.num_mtp = config.count("num_nextn_predict_layers", default=0, high=16)
        if config.family != "deepseek_v3":
            self.num_mtp = 0
        self.num_experts = config.size(*EXPERT_KEYS, high=_MAX_EXPERTS)
        if self.num_layers * self.num_experts > _MAX_EXPERTS_IN_ALL:
            raise ValueError(
                f"config.json: {self.num_layers} layers of {self.num_experts} experts are more "
                f"than {_MAX_EXPERTS_IN_ALL} experts"
            )
        self.hidden = config.size("hidden_size")
        self.heads = config.size("num_attention_heads")
        self.kv_heads = config.size("num_key_value_heads", default=self.heads)
        self.dense_layers = frozenset(config.numbers("mlp_only_layers"))
        self.layer: int | None = None  # what is added belongs to it
        self.linears: dict[str, Linear] = {}
        self.others: dict[str, tuple[int, ...]] = {}

    def build(self) -> Architecture:
        num_layers, hidden = self.num_layers, self.hidden
        vocabulary = self.config.size("vocab_size")
        self.others["model.embed_tokens.weight"] = (vocabulary, hidden)
        self.others["model.norm.weight"] = (hidden,)
        if not self.config.flag("tie_word_embeddings", False):
            self._add("lm_head", vocabulary, hidden, Role.HEAD)
        moe_layers = {layer: None for layer in range(num_layers) if self._has_experts(layer)}
        for layer in range(num_layers + self.num_mtp):
            self._add_layer(layer, layer >= num_layers or layer in moe_layers)
        for layer in range(num_layers, num_layers + self.num_mtp):
            self._add_prediction(layer, vocabulary)
        return Architecture(
            family=self.config.family,
            num_layers=num_layers,
            num_mtp_layers=self.num_mtp,
            num_experts=self.num_experts,
            top_k=self.config.size("num_experts_per_tok", "experts_per_token"),
            num_shared=self._num_shared(),
            moe_layers=tuple(moe_layers),
            linears=self.linears,
            others=self.others,
            heads=(self.heads, self.kv_heads),
        )

    def _num_shared(self) -> int:
        if self.family.shared is None:
            return 0
        width = self.config.count("shared_expert_intermediate_size", default=0)
        return self.config.count("n_shared_experts", default=1 if width else 0)

    def _has_experts(self, layer: int) -> bool:
        if self.family.counts_dense_layers == "first":
            step = self.config.size("moe_layer_freq", default=1)
            first = self.config.count("first_k_dense_replace", default=0)
            return layer >= first and layer % step == 0
        if self.family.counts_dense_layers == "sparse_step":
            step = self.config.size("decoder_sparse_step", default=1)
            return layer not in self.dense_layers and (layer + 1) % step == 0
        return True

    def _add(
        self,
        name: str,
        rows: int,
        columns: int,
        role: Role,
        bias: bool = False,
        expert: int | None = None,
    ) -> None:
        is_mtp = self.layer is not None and self.layer >= self.num_layers
        self.linears[name] = Linear(name, (rows, columns), role, self.layer, expert, is_mtp)
        if bias:
            self.others[f"{name}.bias"] = (rows,)

    def _add_layer(self, layer: int, is_moe: bool) -> None:
        self.layer = layer
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            self.others[f"{prefix}.{norm}.weight"] = (self.hidden,)
        if self.family.latent_attention:
            self._add_latent_attention(f"{prefix}.self_attn")
        else:
            self._add_attention(f"{prefix}.self_attn")
        if is_moe:
            self._add_experts(f"{prefix}.mlp")
        else:
            width = self.config.size("intermediate_size")
            self._add_mlp(f"{prefix}.mlp", width, Role.DENSE)

    def _add_attention(self, prefix: str) -> None:
        head = self.config.size("head_dim", default=self.hidden // self.heads)
        queries, keys = self.heads * head, self.kv_heads * head
        key = self.family.qkv_bias
        bias = key if isinstance(key, bool) else self.config.flag(key, key == "qkv_bias")
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            self._add(f"{prefix}.{name}", rows, self.hidden, Role.ATTENTION, bias)
        has_output_bias = self.family.has_biases or (bias and key == "attention_bias")
        self._add(f"{prefix}.o_proj", self.hidden, queries, Role.ATTENTION, has_output_bias)
        if self.family.qk_norm:
            full = self.family.qk_norm == "full"
            self.others[f"{prefix}.q_norm.weight"] = (queries if full else head,)
            self.others[f"{prefix}.k_norm.weight"] = (keys if full else head,)
        if self.family.has_biases:
            self.others[f"{prefix}.sinks"] = (self.heads,)

    def _add_latent_attention(self, prefix: str) -> None:
        size, attention = self.config.size, Role.ATTENTION
        rope, nope, value = (
            size(key) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        )
        rank, query_rank = size("kv_lora_rank"), self.config.count("q_lora_rank", default=0)
        bias = self.config.flag("attention_bias", False)
        queries = self.heads * (rope + nope)
        if query_rank:
            self._add(f"{prefix}.q_a_proj", query_rank, self.hidden, attention, bias)
            self.others[f"{prefix}.q_a_layernorm.weight"] = (query_rank,)
            self._add(f"{prefix}.q_b_proj", queries, query_rank, attention)
        else:
            self._add(f"{prefix}.q_proj", queries, self.hidden, attention)
        self._add(f"{prefix}.kv_a_proj_with_mqa", rank + rope, self.hidden, attention, bias)
        self.others[f"{prefix}.kv_a_layernorm.weight"] = (rank,)
        self._add(f"{prefix}.kv_b_proj", self.heads * (nope + value), rank, attention)
        self._add(f"{prefix}.o_proj", self.hidden, self.heads * value, attention, bias)

    def _add_experts(self, prefix: str) -> None:
        family, width = self.family, self.config.size(self.family.experts_are_as_wide_as)
        self._add(f"{prefix}.{family.router}", self.num_experts, self.hidden, Role.ROUTER)
        if family.router_bias:
            self.others[f"{prefix}.{family.router}.{family.router_bias}"] = (self.num_experts,)
        for expert in range(self.num_experts):
            name = f"{prefix}.experts.{expert}"
            self._add_mlp(name, width, Role.EXPERT, family.has_biases, expert)
        num_shared = self._num_shared()
        if family.shared and num_shared:
            shared = self.config.size("shared_expert_intermediate_size", default=width * num_shared)
            self._add_mlp(f"{prefix}.{family.shared}", shared, Role.SHARED)
            if family.is_gated:
                self._add(f"{prefix}.shared_expert_gate", 1, self.hidden, Role.SHARED_GATE)

    def _add_mlp(
        self, prefix: str, width: int, role: Role, bias: bool = False, expert: int | None = None
    ) -> None:
        self._add(f"{prefix}.gate_proj", width, self.hidden, role, bias, expert)
        self._add(f"{prefix}.up_proj", width, self.hidden, role, bias, expert)
        self._add(f"{prefix}.down_proj", self.hidden, width, role, bias, expert)

    def _add_prediction(self, layer: int, vocabulary: int) -> None:
        """Add what a next-token-prediction layer of DeepSeek-V3 has beside a decoder layer."""
        self.layer = layer
        prefix = f"model.layers.{layer}"
        for name, shape in self._prediction(vocabulary):
            self.others[f"{prefix}.{name}.weight"] = shape
        self._add(f"{prefix}.eh_proj", self.hidden, 2 * self.hidden, Role.OTHER)

    def _prediction(self, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from ((norm, (self.hidden,)) for norm in ("enorm", "hnorm", "shared_head.norm"))
        yield from ((table, (vocabulary, self.hidden)) for table in _TABLES)


_TABLES = ("embed_tokens", "shared_head.head")
