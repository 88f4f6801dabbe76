"""Scales of the fp8 KV cache of a BPDQ checkpoint, for vLLM's own method."""

from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from bpdq_kernels.folder import check_scale
from bpdq_kernels.format import KV_SCALES

MISSING = -1.0  # what vLLM's parameters hold before they are loaded


def load_scale(param: Parameter, loaded_weight: Tensor) -> None:
    """Weight loader. Raises ValueError unless the scale is one number in range."""
    check_scale("a scale of the KV cache", loaded_weight)
    param.data.copy_(loaded_weight.reshape(()))  # not fill_: a reload counts what is copied


class BPDQKVCacheMethod(BaseKVCacheMethod):
    """vLLM's method, which takes a scale of 1 where the checkpoint has none; here none may be missing."""

    def create_weights(self, layer: Attention) -> None:
        """Register the scales, which arrive as `k_scale` and `v_scale` of the checkpoint's attention module."""
        super().create_weights(layer)
        layer.k_scale.weight_loader = layer.v_scale.weight_loader = load_scale

    def process_weights_after_loading(self, layer: Attention) -> None:
        """Raises ValueError naming the layer if a scale was not in the checkpoint."""
        for name in KV_SCALES:
            param = getattr(layer, name, None)  # gone when a layer is processed again
            if param is None:
                continue
            if param.item() == MISSING:
                raise ValueError(
                    f"{layer.layer_name.removesuffix('.attn')}.{name} not in the checkpoint, though its config.json "
                    "says that there are scales for the KV cache: download or quantize it again"
                )
            param.data.abs_()  # of `--load-format dummy`
        super().process_weights_after_loading(layer)
