"""RWKV as transformers models: embeddings, a stack of blocks, a head, and a state to generate with.

The blocks are a version's own (:mod:`moeq_plugin.rwkv.rwkv6`, ``rwkv7``). Nothing here depends
on data or has a cache object, so that llm-compressor can trace it block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.generic import ModelOutput, can_return_tuple

from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.rwkv.config import RWKVConfig
from moeq_plugin.rwkv.fla import is_fla_folder, read_fla_folder
from moeq_plugin.rwkv.layers import LayerState
from moeq_plugin.rwkv.official import Tensors, read_pth, to_state_dict, version_of

State = tuple[LayerState, ...]
# called with every model that transformers has loaded, by whoever knows how its weights can run
AFTER_LOADING: list[Callable[[nn.Module], object]] = []
_UNUSABLE = ("device_map", "quantization_config", "state_dict", "torch_dtype")


@dataclass
class RWKVOutput(ModelOutput):
    """What an RWKV model returns; absent where not asked for.

    Attributes:
        loss: of predicting ``labels``.
        logits: ``[batch, tokens, vocabulary]``.
        last_hidden_state: ``[batch, tokens, hidden]`` after the last norm.
        hidden_states: the embeddings, and what each block returned.
        state: one :class:`LayerState` per block, after the last token.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    state: State | None = None


class RWKVPreTrainedModel(PreTrainedModel):
    """Loading and saving."""

    base_model_prefix = "model"
    _is_stateful = True
    config_class: type[RWKVConfig]
    block_class: type[nn.Module]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ElementwiseScale):
            init.copy_(module.weight, module.initial())


class RWKVModel(RWKVPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        self.emb: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            self.block_class(config, index) for index in range(config.num_hidden_layers)
        )
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the tokens."""
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of the tokens."""
        self.emb = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> RWKVOutput:
        """Feed ``[batch, tokens]`` ids.

        Args:
            input_ids: the tokens after those that ``state`` has seen.
            attention_mask: ``[batch, at least tokens]``, 0 for padding on the left.
            state: what an earlier call returned, or ``None`` at the start of a text.
            inputs_embeds: ``[batch, tokens, hidden]`` instead of ids.
            use_cache: whether to return the state; by default as the configuration says.
            output_hidden_states: whether to return what each block returned.
            **kwargs: ignored.
        """
        hidden = _embed(self.emb, input_ids, inputs_embeds)
        states, every_hidden, v_first = [], [hidden], None
        for index, block in enumerate(self.blocks):
            hidden, v_first, layer_state = block(
                hidden, v_first, attention_mask, _pick(state, index)
            )
            states.append(layer_state)
            every_hidden.append(hidden)
        return RWKVOutput(
            last_hidden_state=self.ln_out(hidden),
            hidden_states=_keep(every_hidden, output_hidden_states, default=False),
            state=_keep(states, use_cache, default=self.config.use_cache and not self.training),
        )


def _check_readable(config: RWKVConfig) -> None:
    """Refuse codebook weights where nothing reads them.

    transformers only warns of a quantization that it does not know, and fills in random weights.

    Raises:
        ImportError: naming the import that is missing.
    """
    section: Any = getattr(config, "quantization_config", None) or {}
    method = section.get("quant_method") if isinstance(section, dict) else section.quant_method
    if method == "moeq" and method not in AUTO_QUANTIZER_MAPPING:
        raise ImportError(
            "the checkpoint has codebook weights (quant_method moeq), which transformers reads "
            "only after `import moeq_plugin.integrations.hf`; without it they would be random"
        )


class RWKVForCausalLM(RWKVPreTrainedModel, GenerationMixin):
    """Token ids to the next token's logits."""

    _tied_weights_keys = {"lm_head.weight": "model.emb.weight"}
    model_class: type[RWKVModel]
    version: int

    def __init__(self, config: RWKVConfig) -> None:
        super().__init__(config)
        _check_readable(config)
        self.model = self.model_class(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Load a folder as transformers does, or a checkpoint of another layout.

        Those are official ``.pth`` files and local folders of flash-linear-attention.

        Args:
            pretrained_model_name_or_path: folder or name, or path of a file ending in ``.pth``.
            *model_args: see transformers.
            **kwargs: see transformers; of those that change the model, another layout takes
                only ``dtype``.

        Raises:
            ValueError: if another layout is not of this version or comes with such arguments.
        """
        path = pretrained_model_name_or_path
        read = _reader_of_another_layout(path)
        if read is None:
            loaded: Self = super().from_pretrained(path, *model_args, **kwargs)
            for prepare in AFTER_LOADING:
                prepare(loaded)
            return loaded
        if unusable := [name for name in _UNUSABLE if kwargs.get(name) is not None]:
            raise ValueError(
                f"{path} is converted while loading, which takes no {unusable}; "
                "load it, save_pretrained, and load the new folder with them"
            )
        tensors, dtype = read(path), kwargs.get("dtype")
        if (version := version_of(tensors)) != cls.version:
            raise ValueError(f"{path} is for RWKV{version}ForCausalLM, not for {cls.__name__}")
        dtype = None if dtype == "auto" else dtype
        # nobody else holds what was read for this model
        return cls.from_official(tensors, dtype=dtype, copy=False)

    @classmethod
    def from_official(
        cls, tensors: Tensors, *, dtype: torch.dtype | None = None, copy: bool = True
    ) -> Self:
        """Build the model of this version that official tensors belong to.

        The model is never initialized: its parameters are the tensors. Those of another dtype, and
        those that a linear has transposed, are copied one by one, whatever ``copy`` says.

        Args:
            tensors: by official name; sizes are read from their shapes.
            dtype: of the model; ``None`` for that of the embedding.
            copy: otherwise the model shares memory with the tensors, where they fit as they are.

        Returns:
            A model in evaluation mode.
        """
        config = cls.config_class.of_tensors(tensors)
        with torch.device("meta"):  # names and shapes only
            model = cls(config)
        state_dict = to_state_dict(tensors, model.state_dict(), cls.version)
        dtype = tensors["emb.weight"].dtype if dtype is None else dtype
        model.config.dtype = dtype
        for name, tensor in state_dict.items():
            fitting = tensor.to(dtype).contiguous()
            is_shared = fitting.data_ptr() == tensor.data_ptr()
            state_dict[name] = fitting.clone() if copy and is_shared else fitting
        model.load_state_dict(state_dict, assign=True)
        module: nn.Module = model  # transformers' own `eval` is untyped
        module.eval()
        return model

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: State | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> RWKVOutput:
        """Feed ``[batch, tokens]`` ids.

        Args:
            input_ids: the tokens after those that ``state`` has seen.
            attention_mask: ``[batch, at least tokens]``, 0 for padding on the left.
            state: what an earlier call returned, or ``None`` at the start of a text.
            inputs_embeds: ``[batch, tokens, hidden]`` instead of ids.
            labels: ``[batch, tokens]`` ids to predict, shifted here; -100 is ignored.
            use_cache: whether to return the state; by default as the configuration says.
            output_hidden_states: whether to return what each block returned.
            logits_to_keep: of how many of the last tokens; 0 for all.
            **kwargs: handed to the loss.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            state=state,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return RWKVOutput(
            loss=self._loss(logits, labels, kwargs),
            logits=logits,
            hidden_states=output.hidden_states,
            state=output.state,
        )

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor | None, arguments: dict[str, Any]
    ) -> torch.Tensor | None:
        if labels is None:
            return None
        loss: torch.Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **arguments
        )
        return loss

    @staticmethod
    def _reorder_cache(state: State, beam_idx: torch.Tensor) -> State:
        """Give each beam the state of the beam that it continues."""
        return tuple(LayerState(*(x[beam_idx] for x in layer)) for layer in state)


def _reader_of_another_layout(path: Any) -> Callable[[str | Path], Tensors] | None:
    if str(path).endswith(".pth"):
        return read_pth
    return read_fla_folder if path and is_fla_folder(path) else None


# Functions of their own: llm-compressor rewrites conditions inside the forward of these models.


def _embed(
    emb: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> Any:
    return emb(input_ids) if inputs_embeds is None else inputs_embeds


def _pick(state: State | None, index: int) -> LayerState | None:
    return None if state is None else state[index]


def _keep(values: list[Any], wanted: bool | None, *, default: bool) -> tuple[Any, ...] | None:
    return tuple(values) if (default if wanted is None else wanted) else None
