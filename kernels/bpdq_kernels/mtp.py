"""Heads for multi-token prediction (MTP), which transformers' models lack: vLLM drafts tokens with them, `vllm serve
--speculative-config '{"method": "mtp", ...}'`. Their tensors stand beside the model's, in 16 bits.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COUNTS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_NAMED = r"(.*[.])?mtp[._]"  # Qwen3.5, ERNIE, LongCat
_NUMBERED = r"(model[.])?(language_model[.])?layers[.]"  # behind the decoder's blocks: DeepSeek, GLM


def head_layers(config: "PreTrainedConfig") -> int:
    """How many layers a config says there are in heads; 0 if it says nothing."""
    parts = (config.get_text_config(decoder=True), config)
    counts = [getattr(part, key, None) for part in parts for key in _COUNTS]
    return next((count for count in counts if isinstance(count, int) and count > 0), 0)


def head_pattern(name: str, config: "PreTrainedConfig") -> str | None:
    """The `re:` pattern for `ignore` by which a tensor or layer `name`, of the checkpoint or vLLM's model, belongs to a
    head; None for any other, unless the model itself has modules that are called so."""
    if re.match(_NAMED, name):
        return f"re:{_NAMED}"
    numbered = re.match(rf"{_NUMBERED}(?P<index>\d{{1,6}})[.]", name)
    blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not numbered or not isinstance(blocks, int):
        return None
    index = int(numbered["index"])
    return f"re:{_NUMBERED}{index}[.]" if blocks <= index < blocks + head_layers(config) else None
