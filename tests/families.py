"""What is known of each family of `architectures.py`: of what kind it is, which published models are built like it, and
whether vLLM's CPU engine runs the tiny model in 16 bits.

docs/models.md is made from this: python -m scripts.model_table.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from mixtures import EXPERTS


class Family(NamedTuple):
    """engine: how vLLM 0.32's CPU engine is to load the tiny model, or why it does not run it in 16 bits; refuses: the
    options of `bpdq quantize` that end with an error; ignore: what has to stay in 16 bits for vLLM; same: whether the
    engine gives transformers' tokens in 16 bits; gain: of `model_folder`, with which tokens differ."""

    kind: str
    models: str
    engine: Mapping[str, Any] | str = MappingProxyType({})
    refuses: tuple[str, ...] = ()
    ignore: str = ""
    same: bool = True
    gain: float = 8


NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
BF16 = {"dtype": "bfloat16"}  # which vLLM's CPU backend asks for where there is a GatedDeltaNet
SHARED_KEYS = ("--target-bpw", "--kv-cache-scales")
NO_SCALES = ("--kv-cache-scales",)
NO_TABLES = ("--embed-bits",)

# what --rotate folds into
ROTATED = (
    *("ernie4_5", "gemma", "granite", "helium", "llama", "ministral", "ministral3", "qwen2", "qwen3", "seed_oss"),
    *("smollm3", "mistral"),
)

NO_MODEL = "vLLM has no model of it"
NO_ATTENTION = "vLLM has no model of it, and its Transformers backend does not find its attention"
ONLY_EXPERTS = "vLLM's model wants a layer of experts"
NO_SCAN = "the CPU build has no Mamba-1 kernel; nor does vLLM take its layers in bit-planes elsewhere"
FAMILIES: dict[str, Family] = {
    "apertus": Family("dense", "Apertus-8B-2509, Apertus-70B-2509"),
    "arcee": Family("dense", "AFM-4.5B"),
    "biogpt": Family(
        "dense",
        "BioGPT, BioGPT-Large",
        "vLLM has no model of it, and in its Transformers backend a view of a tensor fails",
        refuses=NO_TABLES,
    ),
    "bitnet": Family("dense", "bitnet-b1.58-2B-4T-bf16"),
    "cohere": Family("dense", "Command R, Command R+, Aya 23, Aya Expanse"),
    "diffllama": Family("dense, differential attention", "DiffLlama-0.3B-handcut", NO_ATTENTION),
    "ernie4_5": Family("dense", "ERNIE-4.5-0.3B"),
    "gemma": Family("dense", "Gemma 2B and 7B, CodeGemma"),
    "glm": Family("dense", "glm-4-9b-chat-hf, GLM-Edge 1.5B and 4B"),
    "glm4": Family("dense", "GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1-32B-0414"),
    "gpt_neox": Family("dense", "Pythia 70M to 12B, GPT-NeoX-20B", same=False, refuses=NO_SCALES),
    "gpt_neox_japanese": Family("dense", "gpt-neox-japanese-2.7b", NO_MODEL, refuses=NO_SCALES),
    "granite": Family("dense", "Granite 3.0 to 3.3, 2B and 8B"),
    "helium": Family("dense", "Helium-1-2B"),
    "hunyuan_v1_dense": Family("dense", "Hunyuan-0.5B, 1.8B, 4B, 7B-Instruct", refuses=NO_SCALES),
    "jais2": Family("dense", "Jais-2-8B-Chat, Jais-2-70B-Chat"),
    "llama": Family("dense", "Llama 2, 3, 3.1, 3.2 (text), Llama-3.3-70B, SmolLM2, Yi, DeepSeek-R1-Distill-Llama"),
    "ministral": Family("dense, sliding windows", "Ministral-8B-Instruct-2410"),
    "ministral3": Family("dense", "the text models of Ministral 3 3B, 8B and 14B"),
    "nanochat": Family("dense", "nanochat-d32"),
    "nemotron": Family("dense", "Nemotron-4 (Minitron-4B, 8B)"),
    "olmo": Family("dense", "OLMo-1B-hf, OLMo-7B-hf"),
    "olmo2": Family("dense", "OLMo-2-0425-1B, 1124-7B, 1124-13B, 0325-32B"),
    "persimmon": Family("dense", "persimmon-8b", same=False),
    "phi": Family("dense", "Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family("dense", "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini"),
    "qwen2": Family("dense", "Qwen2 and Qwen2.5 0.5B to 72B, QwQ-32B, DeepSeek-R1-Distill-Qwen"),
    "qwen3": Family("dense", "Qwen3 0.6B to 32B"),
    "seed_oss": Family("dense", "Seed-OSS-36B"),
    "smollm3": Family("dense", "SmolLM3-3B"),
    "stablelm": Family("dense", "StableLM-3B-4E1T, StableLM 2 1.6B and 12B"),
    "starcoder2": Family("dense", "StarCoder2 3B, 7B and 15B"),
    "vaultgemma": Family("dense", "VaultGemma-1B"),
    "opt": Family("dense, position table", "OPT 125M to 66B"),
    "gptj": Family("dense", "GPT-J-6B", refuses=NO_SCALES),
    "codegen": Family("dense", "CodeGen 350M to 16B", NO_MODEL, refuses=NO_SCALES),
    "gpt_bigcode": Family("dense, one key/value head", "StarCoder, SantaCoder", refuses=NO_SCALES),
    "ctrl": Family("dense", "CTRL", refuses=NO_SCALES),
    "gpt_neo": Family("dense, local attention", "GPT-Neo 125M, 1.3B and 2.7B", NO_MODEL, refuses=NO_SCALES),
    "falcon": Family("dense", "Falcon 7B, 40B and 180B", refuses=NO_SCALES),
    "mpt": Family("dense, alibi", "MPT-7B, MPT-30B", "vLLM has no model of it since 0.28", refuses=NO_SCALES),
    "bloom": Family("dense, alibi", "BLOOM, BLOOMZ", ignore="re:.*query_key_value", gain=16, refuses=NO_SCALES),
    "xglm": Family("dense, position table", "XGLM 564M to 7.5B", NO_MODEL, refuses=NO_TABLES),
    "cohere2": Family("sliding windows", "Command R7B, Command A, Aya Vision's text models", same=False),
    "exaone4": Family("sliding windows", "EXAONE-4.0 1.2B and 32B"),
    "gemma2": Family("sliding windows", "Gemma 2 2B, 9B and 27B"),
    "gemma3_text": Family("sliding windows", "Gemma 3 270M and 1B"),
    "mistral": Family("dense, or sliding windows", "Mistral 7B, Mistral-Nemo 12B, Mistral-Large-2 123B, Codestral 22B"),
    "olmo3": Family("sliding windows", "Olmo 3 7B and 32B"),
    "modernbert-decoder": Family("dense, sliding windows", "Ettin decoders, 17M to 1B", NO_MODEL),
    "gemma4_text": Family("sliding windows, shared keys and values", "the text models of Gemma 4", refuses=SHARED_KEYS),
    "minicpm3": Family("latent attention", "MiniCPM3-4B"),
    "deepseek_v2": Family("latent attention", "", same=False, refuses=NO_SCALES),
    "deepseek_v3": Family("latent attention", "", same=False, refuses=NO_SCALES),
    "glm4_moe_lite": Family("latent attention", "", ONLY_EXPERTS, refuses=NO_SCALES),
    "youtu": Family(
        "latent attention",
        "Youtu-LLM-2B",
        "vLLM has no model of it, and its Transformers backend no latent attention of that size",
        refuses=NO_SCALES,
    ),
    "falcon_h1": Family("hybrid, Mamba-2", "Falcon-H1 0.5B, 1.5B, 3B, 7B and 34B", refuses=NO_SCALES),
    "granitemoehybrid": Family("hybrid, Mamba-2", "Granite 4.0 H Micro, H 1B and H 350M", refuses=NO_SCALES),
    "lfm2": Family("hybrid, short convolutions", "LFM2 350M, 700M, 1.2B and 2.6B", refuses=NO_SCALES),
    "mamba2": Family("Mamba-2", "Mamba-Codestral-7B-v0.1", refuses=NO_SCALES),
    "nemotron_h": Family(
        "hybrid, Mamba-2",
        "Nemotron-H 4B, 8B, 47B and 56B, NVIDIA-Nemotron-Nano-9B-v2 and 12B-v2",
        same=False,
        refuses=NO_SCALES,
    ),
    "qwen3_5_text": Family(
        "hybrid, GatedDeltaNet", "the text model of Qwen3.5 (see qwen3_5)", BF16, same=False, refuses=NO_SCALES
    ),
    "qwen3_next": Family("hybrid, GatedDeltaNet", "", ONLY_EXPERTS, refuses=NO_SCALES),
    "olmo_hybrid": Family(
        "hybrid, GatedDeltaNet", "Olmo-Hybrid-7B", "its Triton kernels do not run in the CPU build", refuses=NO_SCALES
    ),
    "kimi_linear": Family("hybrid, Kimi Delta Attention", "", "vLLM's model needs NVIDIA's CUTLASS", refuses=NO_SCALES),
    "bamba": Family("hybrid, Mamba-2", "Bamba-9B", NO_ATTENTION, refuses=NO_SCALES),
    "jamba": Family(
        "hybrid, Mamba-1", "", "the CPU build has no Mamba-1 kernel", ignore="re:.*[.]mamba[.]", refuses=NO_SCALES
    ),
    "mamba": Family("Mamba-1", "mamba-130m-hf to mamba-2.8b-hf", NO_SCAN, refuses=NO_SCALES),
    "falcon_mamba": Family("Mamba-1", "falcon-mamba-7b", NO_SCAN, refuses=NO_SCALES),
    "recurrent_gemma": Family("hybrid, RG-LRU", "RecurrentGemma 2B and 9B", NO_ATTENTION, refuses=NO_SCALES),
    "qwen2_5_vl": Family("images: Qwen2", "Qwen2.5-VL 3B, 7B, 32B and 72B", NO_IMAGES),
    "qwen3_vl": Family("images: Qwen3", "Qwen3-VL 2B, 4B, 8B and 32B", NO_IMAGES),
    "qwen3_5": Family(
        "images: GatedDeltaNet", "Qwen3.5-27B, Qwen3.6-27B", NO_IMAGES | BF16, same=False, refuses=NO_SCALES
    ),
    "glm4v": Family("images: GLM-4", "GLM-4.1V-9B-Thinking", NO_IMAGES),
    "gemma3": Family("images: sliding windows", "Gemma 3 4B, 12B and 27B", NO_IMAGES),
    "gemma4": Family("images: sliding windows", "Gemma-4-31B", NO_IMAGES, refuses=SHARED_KEYS),
    "mistral3": Family("images: Mistral", "Mistral-Small-3.1-24B, Mistral-Small-3.2-24B", NO_IMAGES),
    "internvl": Family("images: Qwen2, or Qwen3", "InternVL3 1B to 78B (`-hf`)", NO_IMAGES),
    "llava": Family("images: Llama", "LLaVA 1.5 7B and 13B (`-hf`)", NO_IMAGES),
    "llava_onevision": Family("images: Qwen2", "LLaVA-OneVision 0.5B, 7B and 72B (`-hf`)", NO_IMAGES),
    "smolvlm": Family("images: Llama", "SmolVLM2 256M, 500M and 2.2B", NO_IMAGES),
    "idefics3": Family("images: Llama", "Idefics3-8B-Llama3", NO_IMAGES),
    "qwen3_5_moe": Family(
        "images: experts, GatedDeltaNet", "Qwen3.5-35B-A3B", NO_IMAGES | BF16, same=False, refuses=NO_SCALES
    ),
    "qwen3_vl_moe": Family("images: experts", "Qwen3-VL-30B-A3B and 235B-A22B", NO_IMAGES),
    "llama4": Family("images: experts", "Llama 4 Scout and Maverick", NO_IMAGES),
}
MIXED: dict[str, Family] = {
    "mixtral": Family("experts", "Mixtral 8x7B and 8x22B"),
    "qwen2_moe": Family("experts", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
    "qwen3_moe": Family("experts", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B and 480B-A35B"),
    "olmoe": Family("experts", "OLMoE-1B-7B"),
    "gpt_oss": Family("experts, sliding windows", "gpt-oss-20b and 120b (in MXFP4)"),
    "glm4_moe": Family("experts", "GLM-4.5, 4.6 and Air"),
    "glm4_moe_lite": Family("experts, latent attention", "GLM-4.7-Flash", same=False, refuses=NO_SCALES),
    "deepseek_v2": Family("experts, latent attention", "DeepSeek-V2, V2-Lite, Coder-V2", same=False, refuses=NO_SCALES),
    "deepseek_v3": Family(
        "experts, latent attention", "DeepSeek-V3, R1, Kimi-K2, Moonlight-16B-A3B", same=False, refuses=NO_SCALES
    ),
    "ernie4_5_moe": Family("experts", "ERNIE-4.5-21B-A3B and 300B-A47B"),
    "granitemoe": Family("experts", "Granite 3.0 and 3.1 1B-A400M, 3B-A800M"),
    "granitemoeshared": Family("experts", "granite-4.0 previews"),
    "granitemoehybrid": Family("experts, Mamba-2", "Granite 4.0 H Tiny and H Small", refuses=NO_SCALES),
    "minimax_m2": Family("experts", "MiniMax-M2", "its model for vLLM does not load the tiny one"),
    "hunyuan_v1_moe": Family("experts", "Hunyuan-A13B", refuses=NO_SCALES),
    "llama4_text": Family("experts", "the text models of Llama 4 Scout and Maverick"),
    "phimoe": Family("experts", "Phi-3.5-MoE", "vLLM's model fails as it is built"),
    "lfm2_moe": Family("experts, short convolutions", "LFM2-8B-A1B", same=False, refuses=NO_SCALES),
    "qwen3_next": Family("experts, GatedDeltaNet", "Qwen3-Next-80B-A3B", BF16, same=False, refuses=NO_SCALES),
    "qwen3_5_moe_text": Family(
        "experts, GatedDeltaNet", "the text model of Qwen3.5-35B-A3B", BF16, same=False, refuses=NO_SCALES
    ),
    "gemma4_text": Family("experts, sliding windows", "the text model of Gemma-4-26B-A4B", refuses=SHARED_KEYS),
    "nemotron_h": Family(
        "experts, Mamba-2", "Nemotron 3 Nano", "experts without a gate are for GPUs in vLLM", refuses=NO_SCALES
    ),
    "afmoe": Family("experts", "Trinity"),
    "dots1": Family("experts", "dots.llm1"),
    "exaone_moe": Family("experts", "K-EXAONE-236B-A23B"),
    "flex_olmo": Family("experts", "FlexOlmo-7x7B-1T"),
    "cohere2_moe": Family("experts", "", "not asked"),
    "jamba": Family("experts, Mamba-1", "Jamba", "the CPU build has no Mamba-1 kernel", refuses=NO_SCALES),
    "kimi_linear": Family(
        "experts, Kimi Delta Attention", "Kimi-Linear-48B-A3B", "vLLM's model needs NVIDIA's CUTLASS", refuses=NO_SCALES
    ),
}
FAMILIES |= {f"{name}{EXPERTS}": family for name, family in MIXED.items()}
