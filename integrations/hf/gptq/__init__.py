"""The GPTQ format: its config, tensors and names, conversion both ways, Optimum's quantizer."""
