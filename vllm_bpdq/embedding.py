"""Embedding and LM head of a BPDQ checkpoint in vLLM: sharded over the vocabulary, looked up and multiplied."""

from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bpdq_kernels import embedding, warm_up_embedding
from vllm_bpdq.linear import BPDQLinearMethod, StoredParameter


def load_vocabulary(layer: VocabParallelEmbedding, param: StoredParameter, loaded_weight: Tensor) -> None:
    """Weight loader: this rank's rows of the vocabulary, and zeros in the rows that pad it."""
    tensor = param.receive(loaded_weight, layer.org_vocab_size)
    start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    padding = param.shape[-1] - (end - start)
    param.data.copy_(pad(tensor[..., start:end], (0, padding)))  # all of it: a reload counts what is copied


class BPDQEmbeddingMethod(BPDQLinearMethod):
    """Embedding or LM head `name` in `scheme`, with N = vocabulary and K = hidden size."""

    def create_weights(self, layer: Module, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """As for a linear layer, of this rank's part of the vocabulary."""

        def load(param: StoredParameter, loaded_weight: Tensor) -> None:
            load_vocabulary(layer, param, loaded_weight)

        super().create_weights(layer, *sizes, **{**extra_weight_attrs, "weight_loader": load})

    def process_weights_after_loading(self, layer: Module) -> None:
        """As for a linear layer, which a tied one is too; an LM head that a pooling model has put aside stays so."""
        if layer.B.is_meta:
            return
        super().process_weights_after_loading(layer)
        layer.weight = layer.B.new_empty(0, dtype=layer.params_dtype)  # as LoRA asks for its device and dtype
        warm_up_embedding(self.prepared(layer), layer.params_dtype)

    def embedding(self, layer: Module, input_: Tensor) -> Tensor:
        """Rows `input_` (any shape, of this rank) of the weight: [*input_.shape, K] in the layer's dtype."""
        return embedding(input_, self.prepared(layer), layer.params_dtype)

    def tie_weights(self, layer: Module, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
        """A tied LM head is the embedding itself, with the bias that vLLM asks a head for: none. Raises ValueError for
        an embedding in 16 bits."""
        if not isinstance(embed_tokens.quant_method, BPDQEmbeddingMethod):
            raise ValueError(
                f"{self.name} is in bit-planes and tied to an embedding in 16 bits: name the embedding in "
                f"`layers` of quantization_config too, or quantize the model again"
            )
        embed_tokens.register_parameter("bias", None)
        return embed_tokens
