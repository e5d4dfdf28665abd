"""RWKV for transformers: versions 6 and 7, which it lacks, and version 4, which does not reload.

Importing this package calls :func:`register`, so that ``AutoModelForCausalLM`` knows them all.
"""

from moeq_plugin.models.elementwise import ElementwiseScale, elementwise_parameters
from moeq_plugin.rwkv.loading import from_official, load_pth
from moeq_plugin.rwkv.official import to_official
from moeq_plugin.rwkv.register import guard_initialization, register
from moeq_plugin.rwkv.rwkv4 import disable_rescaling
from moeq_plugin.rwkv.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from moeq_plugin.rwkv.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from moeq_plugin.rwkv.tokenizer import RWKVWorldTokenizer

__all__ = [
    "ElementwiseScale",
    "RWKV6Config",
    "RWKV6ForCausalLM",
    "RWKV7Config",
    "RWKV7ForCausalLM",
    "RWKVWorldTokenizer",
    "disable_rescaling",
    "elementwise_parameters",
    "from_official",
    "guard_initialization",
    "load_pth",
    "register",
    "to_official",
]

register()
