"""How sources that are quantized already store a weight."""

from bpdq_quantizer.model.formats import compressed, fp8, mxfp4

FORMATS = {  # by `quant_method` of config.json
    "fp8": fp8.FORMAT,
    "mxfp8": fp8.FORMAT,
    "compressed-tensors": compressed.FORMAT,
    "mxfp4": mxfp4.FORMAT,
}
