"""What every command says of a model without experts, in the same words."""

NO_EXPERTS = (
    "this model has no expert layers: quantizing it works, each linear on all tokens, but "
    "llm-compressor's own GPTQModifier is made for such models"
)


def is_dense(family: str, num_moe_layers: int) -> bool:
    """Tell whether a model is one for others: RWKV has no experts either, and is one of ours.

    Args:
        family: the config's model type.
        num_moe_layers: layers with experts.

    Example:
        >>> is_dense("llama", 0), is_dense("qwen3_moe", 24), is_dense("rwkv7", 0)
        (True, False, False)
    """
    return not num_moe_layers and not family.startswith("rwkv")


def layers_without_experts(family: str, num_layers: int) -> str:
    """Return what there is to say of the layers of such a model.

    Args:
        family: the config's model type.
        num_layers: decoder layers.

    Example:
        >>> layers_without_experts("rwkv7", 12)
        '12 layers without experts'
    """
    about = f"; {NO_EXPERTS}" if is_dense(family, 0) else ""
    return f"{num_layers} layers without experts{about}"
