"""Offline quantizer: a Hugging Face folder becomes a BPDQ checkpoint.

Importing it also teaches transformers to read such checkpoints:
`import bpdq_quantizer; AutoModelForCausalLM.from_pretrained(folder)`.
"""

import bpdq_quantizer.checkpoint.loader  # noqa: F401  registers with transformers
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.perplexity import perplexity
from bpdq_quantizer.model.modules import BPDQLinear
from bpdq_quantizer.run.pipeline import quantize, requantize

__all__ = ["BPDQLinear", "InputError", "perplexity", "quantize", "requantize"]
