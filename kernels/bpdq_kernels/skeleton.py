"""A checkpoint's tensors against the model that they are for: a skeleton on the meta device, as transformers builds it.

vLLM gives its parameters the same names and shapes, in fused layers, and does not notice all that are missing.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from bpdq_kernels import format as bpdq_format
from bpdq_kernels.conversions import check_made, renaming, twice
from bpdq_kernels.errors import InputError
from bpdq_kernels.experts import are_apart, take_apart
from bpdq_kernels.folder import REMEDY, Headers, check_plain
from bpdq_kernels.format import KV_SCALES, Format, Scheme
from bpdq_kernels.layout import WORD, Stored
from bpdq_kernels.mtp import head_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)


def check_config(config: "PreTrainedConfig", stored: Headers) -> None:
    """Raise InputError for a config that no checkpoint with the tensors `stored` can have: more layers than there are
    tensors, which would take for ever, numbers that make every activation NaN, and an architecture, by which vLLM goes,
    of another model_type, by which transformers goes."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(stored):
        raise InputError(
            f"config.json: num_hidden_layers = {layers!r}, but the checkpoint has {len(stored)} tensors: {REMEDY}"
        )
    rope = getattr(text, "rope_parameters", None)
    theta = rope.get("rope_theta", 1) if isinstance(rope, dict) else 1
    numbers = {"rope_theta": (theta, 0 < theta < inf)} if isinstance(theta, int | float) else {}
    for key in ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon"):
        eps = getattr(text, key, 0)
        if isinstance(eps, int | float):
            numbers[key] = eps, 0 <= eps < 1
    for key, (value, is_right) in numbers.items():
        if not is_right:
            raise InputError(f"config.json: {key} = {value} is out of range: {REMEDY}")
    _check_architecture(config)


def _check_architecture(config: "PreTrainedConfig") -> None:
    import transformers

    if not isinstance(config.architectures, list | None):
        raise InputError(f"config.json: architectures = {config.architectures!r} is no list of names: {REMEDY}")
    auto = auto_class(config)
    built = None if auto is None else auto._model_mapping[type(config)].__name__
    for name in config.architectures or ():
        known = getattr(getattr(transformers, str(name), None), "config_class", None)
        if known is not None and known.model_type != config.model_type and name != built:
            raise InputError(
                f"config.json: architectures names {name}, which is not of model_type {config.model_type}: {REMEDY}"
            )


def auto_class(config: "PreTrainedConfig") -> type | None:
    """The class of transformers that builds a config's language model, whole where it sees images too; None if there is
    none."""
    import transformers  # takes seconds

    wraps = config.get_text_config(decoder=True) is not config
    if wraps and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None


def forget_attention(config: "PreTrainedConfig") -> None:
    """Take out of a config how attention is computed, so that transformers chooses: a config.json may name a kernel of
    the Hugging Face Hub, whose code would run."""
    config._attn_implementation = None


def build(config: "PreTrainedConfig", stored: Headers) -> "PreTrainedModel":
    """The 16-bit model of `config` (`auto_class`) on the meta device, for a checkpoint's tensors `stored`; with its
    experts one by one, where that has them so in bit-planes.

    Raises InputError, and ImportError for a model that transformers does not have, or not without other packages.
    """
    check_config(config, stored)
    auto = auto_class(config)
    if auto is None:
        raise ImportError(f"config.json: transformers has no causal language model for model_type {config.model_type}")
    config = copy.deepcopy(config)
    forget_attention(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as e:  # whatever a value of config.json makes a model's code raise
        reason = " ".join(str(e).split())
        raise InputError(f"config.json: transformers can't build the model ({type(e).__name__}: {reason})") from e
    if are_apart(stored):
        take_apart(model)
    return model


def embedding_names(model: "PreTrainedModel") -> tuple[str, str]:
    """Names of the model's input and output embeddings, the latter the LM head; "" for one that it lacks."""
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(model.get_input_embeddings()), ""), names.get(id(model.get_output_embeddings()), "")


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the LM head is the input embedding."""
    return f"{embedding_names(model)[1]}.weight" in model.all_tied_weights_keys


def as_stored(model: "PreTrainedModel", stored: Headers) -> "PreTrainedModel":
    """`model`, or what is in front of its LM head where its config names another class (`LlamaModel`) and the files
    hold no head, as of a model that AutoModel has opened and saved."""
    _, head = embedding_names(model)
    if type(model).__name__ in (model.config.architectures or [type(model).__name__]) or not head or is_tied(model):
        return model
    return model if any(name.startswith(f"{head}.") for name in stored) else model.base_model


def _scheme(model: "PreTrainedModel", fmt: Format, name: str, stored: str, is_table: bool) -> Scheme | None:
    """Scheme of the layer `name` of a skeleton, which the checkpoint calls `stored`. AutoModel saves tensors without
    the prefix of a causal model's, and `quantization_config` as it was: by either name a layer is found there."""
    prefix = f"{model.base_model_prefix}."
    whole = prefix + name if model.base_model is model else name
    known = [stored, whole] if whole == prefix + stored else [stored]
    if is_table:
        return next((scheme for known_as in known if (scheme := fmt.embedding_scheme(known_as))), None)
    return fmt.scheme_for(next(filter(fmt.mentions, known), stored), known)


def quantized_layers(
    model: "PreTrainedModel", fmt: Format, names: Mapping[str, str] = MappingProxyType({})
) -> dict[str, tuple[nn.Module, Scheme]]:
    """The Linears, embedding and LM head of a 16-bit skeleton that a checkpoint of format `fmt` holds as bit-planes, by
    name.

    names: what the checkpoint calls layers, where that differs. Of a tied embedding and LM head only the embedding, by
    whose name both are stored; raises InputError where `fmt` tells them apart.
    """
    embeddings = embedding_names(model)
    found = {}
    for name, module in model.named_modules():
        if name in embeddings or isinstance(module, nn.Linear):
            scheme = _scheme(model, fmt, name, names.get(name, name), name in embeddings)
            if scheme is not None:
                found[name] = (module, scheme)
    if is_tied(model):
        embedding, head = (_scheme(model, fmt, name, names.get(name, name), True) for name in embeddings)
        if embedding != head:
            raise InputError(
                f"{' and '.join(embeddings)} are tied, but quantization_config makes them {embedding} and {head}: "
                "`layers` must name both, with the same bits, group_size, coefficient_bits and code"
            )
        found.pop(embeddings[1], None)
    return found


def stored_layer(name: str, stored: Headers, module: nn.Module, scheme: Scheme) -> Stored:
    """A layer's tensors on the meta device, as the headers describe them; raises InputError unless they fit.

    module: the layer in 16 bits, with a weight [N, K].
    """
    out_features, in_features = module.weight.shape
    return _stored_tensors(name, stored, in_features, out_features, scheme)


def _stored_tensors(name: str, stored: Headers, in_features: int, out_features: int, scheme: Scheme) -> Stored:
    for key in (f"{name}.{tensor}" for tensor in scheme.tensors):
        if key not in stored:
            raise InputError(
                f"{key} is not in the checkpoint, though its config.json says that the layer is quantized: {REMEDY}"
            )
    layer = Stored(*(stored[f"{name}.{tensor}"].meta() for tensor in scheme.tensors))
    bpdq_format.check(name, layer, in_features, out_features, scheme)
    return layer


class Arranged(NamedTuple):
    """A checkpoint's tensors by the names that transformers gives them in a model. made: of those that it makes out of
    others (`bpdq_kernels.conversions`), which are not among `tensors`, what of the checkpoint; layers: what the
    checkpoint calls the layers of `tensors`."""

    tensors: Headers
    made: dict[str, list[str]]
    layers: dict[str, str]


def arranged(stored: Headers, model: "PreTrainedModel") -> Arranged:
    """The tensors of a checkpoint as `model`, a skeleton, has them; raises InputError for one that is there twice."""
    found, model_name, names = Arranged({}, {}, {}), renaming(model), {}
    for name, entry in stored.items():
        layer, _, kind = name.rpartition(".")
        tensor = f"{layer}.weight" if kind in Stored._fields else name  # as which transformers knows the layer
        new, pattern = model_name(tensor)
        if pattern is not None:
            found.made.setdefault(new, []).append(name)
            continue
        new_layer = new.rpartition(".")[0]
        new = new if tensor == name else f"{new_layer}.{kind}"
        if new in names:
            raise twice(name, names[new], stored)
        names[new] = name
        found.tensors[new] = entry
        found.layers[new_layer] = layer
    for new in found.made.keys() & names.keys():
        raise twice(names[new], found.made[new][0], stored)
    return found


def check_stored(
    stored: Headers, model: "PreTrainedModel | None", fmt: Format, spare: Iterable[str] = frozenset()
) -> None:
    """Raise InputError unless a checkpoint of format `fmt` fills the 16-bit skeleton `model`: every tensor is there, of
    the shape and a dtype that it must have, and no tensor has no place, except in a head for multi-token prediction.

    Of the layers `spare` tensors may be missing, or be there without a place. Without a model names are not checked,
    and a warning says so.
    """
    if model is None:
        logger.warning("whether all tensors of this architecture are in the checkpoint can't be checked")
        _check_unnamed(stored, fmt)
        return
    stored_tensors, (stored, made, names) = stored, arranged(stored, model)
    check_made(stored_tensors, made, model)
    spared = _ignored(f"^{re.escape(layer)}[.]" for layer in spare)
    layers = quantized_layers(model, fmt, names)
    for name, (module, scheme) in layers.items():
        if spared(f"{name}.") and f"{name}.B" not in stored:
            continue
        stored_layer(name, stored, module, scheme)
    plain = model.state_dict()
    expected = plain.keys() - {f"{name}.weight" for name in layers} - model.all_tied_weights_keys.keys() - made.keys()
    optional = _ignored(model._keys_to_ignore_on_load_missing)
    for name in sorted(expected):
        if name in stored:
            check_plain(name, stored[name], tuple(plain[name].shape))
        elif not optional(name) and not spared(name):
            raise InputError(f"{name} is not in the checkpoint: {REMEDY}")
    expected |= {f"{name}.{tensor}" for name, (_, scheme) in layers.items() for tensor in scheme.tensors}
    expected |= _check_scales(stored, model, fmt)
    ignored = _ignored({*(model._keys_to_ignore_on_load_unexpected or ()), *DERIVED})
    for name in sorted(stored.keys() - expected):
        if twin := model.all_tied_weights_keys.get(name):
            raise InputError(
                f"{stored[name].file}: {name} is stored, though config.json ties it to {twin}: remove it, or set "
                "tie_word_embeddings to false"
            )
        if head_pattern(name, model.config):
            check_plain(name, stored[name], stored[name].shape)
        elif not ignored(name) and not spared(name):
            raise InputError(
                f"{stored[name].file}: {name} has no place in the model of config.json, a {type(model).__name__} with "
                f"that quantization_config: {REMEDY}"
            )


DERIVED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # older checkpoints store what models compute


def _ignored(patterns: Iterable[str] | None) -> Callable[[str], object]:
    """Whether a name matches one of transformers' own patterns."""
    return re.compile("|".join(f"({pattern})" for pattern in patterns or ()) or r"(?!)").search


def _check_scales(stored: Headers, model: "PreTrainedModel", fmt: Format) -> set[str]:
    """Names of the scales of the KV cache that are stored; raises InputError for shapes, and if there are to be any,
    unless every attention layer has both."""
    found = {name for name in stored if name.rpartition(".")[2] in KV_SCALES}
    for name in found:
        if stored[name].shape != ():
            check_plain(name, stored[name], (1,))
    indexed = {name for name, module in model.named_modules() if hasattr(module, "layer_idx")}
    attention = {name for name in indexed if not any(other.startswith(f"{name}.") for other in indexed)}
    due = {f"{layer}.{scale}" for layer in attention for scale in KV_SCALES} if fmt.kv_cache_scales else set()
    for name in sorted(due - found):
        raise InputError(
            f"{name} is not in the checkpoint, though its config.json says that there are scales for the KV cache: "
            f"{REMEDY}"
        )
    return found


def _check_unnamed(stored: Headers, fmt: Format) -> None:
    """What can be said without a skeleton: raises InputError for other dtypes, and for a layer's tensors that don't fit
    each other and `fmt`."""
    for name, entry in stored.items():
        layer, _, kind = name.rpartition(".")
        if kind not in Stored._fields:
            check_plain(name, entry, entry.shape)
            continue
        B, scheme = stored.get(f"{layer}.B"), fmt.layers.get(layer) or fmt.scheme_for(layer)
        if B is None:
            raise InputError(f"{layer}.B is not in the checkpoint: {REMEDY}")
        if scheme is None or len(B.shape) != 3:
            raise InputError(
                f"{B.file}: {layer}.B is {B.dtype} {B.shape}, but config.json says {scheme or '16 bits'}: {REMEDY}"
            )
        if kind not in scheme.tensors:
            raise InputError(f"{entry.file}: {name} has no place where config.json says {scheme}: {REMEDY}")
        _stored_tensors(layer, stored, WORD * B.shape[0], B.shape[2], scheme)
