"""`bpdq plan` for models with windows, states and eyes: published configs by hand, and what is served with which flags.

tests/configs/ has the sizes of published models, from public sources: Qwen3.5-27B, Gemma 4 31B and Nemotron-H-56B from
their config.json as ai-dynamo/aiconfigurator keeps them (model_configs/), whose plans have the same figures;
Nemotron-H-8B from NVIDIA-NeMo/Megatron-Bridge (models/nemotronh/nemotron_h_provider.py), with 8,100,852,736 parameters
as counted publicly; Qwen2.5-VL-72B from NVIDIA NeMo's Qwen25VLConfig72B (collections/vlm/qwen2vl/model), tower and
projector, and Qwen2.5-72B. **Not confirmed**: the totals of the last and of Nemotron-H-56B in
`test_parameters_are_as_many_as_published`.
"""

import json
import shlex
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bpdq_quantizer.cli import main
from bpdq_quantizer.fit.kv_bytes import Attention, State
from bpdq_quantizer.fit.memory import quantize_host_bytes
from bpdq_quantizer.fit.parts import Block, read_model
from bpdq_quantizer.fit.plan import budget, card_bytes, plan
from bpdq_quantizer.model.opening import plain_skeleton
from test_plan import refusal

CONFIGS = Path(__file__).parent / "configs"
QWEN35, GEMMA4, QWEN25VL, NEMOTRON_8B, NEMOTRON_56B = (
    str(CONFIGS / f"{name}.json")
    for name in ("qwen3.5-27b", "gemma-4-31b", "qwen2.5-vl-72b", "nemotron-h-8b", "nemotron-h-56b")
)
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}
DELTA_NET = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}


def tiny(folder, kind, **changes):
    """The config.json of a small model."""
    AutoConfig.for_model(kind, **{**TINY, **changes}).save_pretrained(folder)
    return str(folder)


def wrapper(folder):
    text = {**TINY, **DELTA_NET, "num_hidden_layers": 4, "head_dim": 32, "mtp_num_hidden_layers": 2}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=VISION)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "billions"),
    [(QWEN35, 27.78), (GEMMA4, 31.27), (QWEN25VL, 73.41), (NEMOTRON_8B, 8.10), (NEMOTRON_56B, 56.3)],
)
def test_parameters_are_as_many_as_published(config, billions):
    m = read_model(config)
    tables = [m.embedding, *([m.head] if m.head else [])]
    total = sum(n * k for n, k in [*m.linears, *tables]) + m.others + m.tower.elements + m.mtp
    assert total / 1e9 == pytest.approx(billions, abs=0.05 if billions > 50 else 0.005)


def test_parts_of_qwen35_by_hand():
    m = read_model(QWEN35)
    hidden, ffn = 5120, 17408
    mlp = [(ffn, hidden), (ffn, hidden), (hidden, ffn)]
    attention = [(2 * 24 * 256, hidden), (4 * 256, hidden), (4 * 256, hidden), (hidden, 24 * 256)]
    delta_net = [(2 * 2048 + 6144, hidden), (6144, hidden), (hidden, 6144)]
    assert {(b.count, tuple(sorted(b.linears))) for b in m.blocks} == {
        (16, tuple(sorted(attention + mlp))), (48, tuple(sorted(delta_net + mlp))),
    }  # fmt: skip
    assert m.layers == [Attention(16, 4, 256), State(48, 2 * 3 * 10240 + 4 * 48 * 128 * 128)]
    norms = 2 * hidden + 2 * 256
    assert m.mtp == sum(n * k for n, k in attention + mlp) + norms + 2 * hidden * hidden + 3 * hidden
    gates, convolution, per_head = 2 * 48 * hidden, 10240 * 4, 2 * 48 + 128
    assert m.others == 48 * (gates + convolution + per_head + 2 * hidden) + 16 * norms + hidden
    found = plan(QWEN35)
    assert found["kv_bytes_per_token"]["auto"] == 16 * 4 * 256 * 2 * 2
    assert found["kv_block_tokens"]["auto"] == 784
    assert found["state_bytes_per_sequence"]["auto"] == 6 * 16 * 784 * 4096
    assert found["mtp_bytes"] == 2 * m.mtp
    assert found["tower_bytes"] == 2 * m.tower.elements
    assert "MTP head is kept" in " ".join(found["assumptions"])


def test_parts_of_gemma4_by_hand():
    m = read_model(GEMMA4)
    assert m.layers == [Attention(50, 16, 256, 1024), Attention(10, 4, 512)]
    assert m.head is None
    assert m.doubled == [(4 * 512, 5376)] * 10  # keys that are values too, which vLLM holds twice
    found = plan(GEMMA4)
    assert found["kv_bytes_per_token"]["auto"] == 10 * 4 * 512 * 2 * 2
    assert found["window_bytes_per_sequence"]["auto"] == 5 * 129 * 16 * 10 * 16 * 256 * 2 * 2
    assert not any(name.startswith(("turboquant", "ultraquant")) for name in found["tokens_that_fit"])
    assert found["kv_cache_dtype"] == "auto"


def test_keys_that_are_values_too_are_on_the_card_twice():
    from test_plan import Scheme, Settings

    m = read_model(GEMMA4)
    settings = Settings(Scheme(2, 128, 8), None, None, 24, 2048)
    once = card_bytes(m._replace(doubled=[]), settings)
    assert card_bytes(m, settings).linear - once.linear == 10 * Scheme(2, 128, 8).tiled_bytes(2048, 5376)


@pytest.mark.parametrize(
    ("config", "options", "flags"),
    [
        (QWEN35, {"context": 131072}, "--limit-mm-per-prompt"),
        (QWEN35, {"context": 131072, "language_model_only": True}, "--language-model-only"),
        (GEMMA4, {"context": 65536}, "--limit-mm-per-prompt"),
        (QWEN25VL, {"embed_bits": 4, "head_bits": 4, "context": 8192}, "--kv-cache-dtype int8_per_token_head"),
        (QWEN25VL, {"language_model_only": True}, "--language-model-only --enforce-eager"),
        (NEMOTRON_8B, {"context": 8192}, ""),
        (NEMOTRON_56B, {"context": 8192}, ""),
    ],
)
def test_published_models_on_a_card_of_24_gib(config, options, flags):
    found = plan(config, **options)
    assert flags in found["serve_command"]
    _, _, _, *given = shlex.split(found["serve_command"])
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(given)
    assert args.max_model_len == found["context"] == options.get("context", 2048)
    assert args.language_model_only == options.get("language_model_only", False)
    images = (
        json.loads(args.limit_mm_per_prompt) if isinstance(args.limit_mm_per_prompt, str) else args.limit_mm_per_prompt
    )
    if "--limit-mm-per-prompt" in given:
        assert images["image"]["count"] == 1
        assert images["video"] == 0
    name = found["kv_cache_dtype"]
    assert found["tokens_that_fit"][name] >= found["context"]
    fixed = found["state_bytes_per_sequence"][name] + found["window_bytes_per_sequence"][name]
    grown = found["context"] * found["kv_bytes_per_token"][name]
    assert args.max_num_seqs <= budget(24) / (fixed + grown) + 1


def test_images_take_room_that_the_text_model_alone_has(capsys):
    line = refusal(capsys, QWEN25VL)
    assert "this would: --embed-bits 4 --head-bits 4, or --language-model-only, or --gpu-memory 26" in line
    both = [plan(QWEN35, language_model_only=alone) for alone in (False, True)]
    assert both[0]["tower_bytes"] == both[1]["tower_bytes"] > 9e8
    assert both[0]["card_weight_bytes"] - both[1]["card_weight_bytes"] == both[0]["tower_bytes"]
    image = 64 * 64 * 2 * 3 * 4304  # patches of 16 pixels, the widest layer
    assert both[0]["card_overhead_bytes"] - both[1]["card_overhead_bytes"] == image
    line = refusal(capsys, NEMOTRON_8B, "--language-model-only")
    assert "NemotronHForCausalLM sees no images" in line


def test_what_a_request_keeps_is_printed(capsys):
    assert main(["plan", QWEN35, "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "each sequence takes 308 MB of states besides, with auto" in table
    assert any(line.startswith("  tower") for line in table)
    assert any(line.startswith("  mtp") for line in table)
    assert found["state_bytes_per_sequence"]["auto"] == pytest.approx(308e6, abs=1e6)
    assert main(["plan", GEMMA4]) == 0
    printed = capsys.readouterr().out
    assert "each sequence takes 1691 MB of windows besides, with auto" in printed
    assert "  mtp" not in printed
    assert "turboquant" not in printed.partition("assumptions")[0]


def elements(config, wraps=False):
    """Of all parameters, counted once."""
    auto = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config)
    return sum(p.numel() for name, p in model.named_parameters() if name not in model.all_tied_weights_keys)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_hidden_layers": 3}),
        ("gemma3_text", {"num_hidden_layers": 6, "head_dim": 32}),
        ("qwen3_5_text", {"num_hidden_layers": 4, "head_dim": 32, **DELTA_NET}),
        ("falcon_h1", {"num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128}),
        ("lfm2", {"num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
        ("deepseek_v3", {
            "num_hidden_layers": 2, "first_k_dense_replace": 9, "q_lora_rank": 32, "kv_lora_rank": 64,
            "num_key_value_heads": 4,
        }),
    ],
)  # fmt: skip
def test_parts_are_all_of_a_model(tmp_path, kind, changes):
    m = read_model(tiny(tmp_path, kind, **changes))
    tables = [m.embedding, *([m.head] if m.head else [])]
    parameters = elements(AutoConfig.from_pretrained(tmp_path))
    assert sum(n * k for n, k in [*m.linears, *tables]) + m.others == parameters
    assert sum(block.count for block in m.blocks) == changes["num_hidden_layers"]
    assert m.tower.elements == m.mtp == 0


def test_parts_of_a_wrapper(tmp_path):
    m = read_model(wrapper(tmp_path))
    config = AutoConfig.from_pretrained(tmp_path)
    parameters = elements(config, wraps=True)
    text = elements(config.get_text_config(decoder=True))
    assert m.tower.elements == parameters - text
    assert sum(n * k for n, k in [*m.linears, m.embedding, m.head]) + m.others == text
    assert m.tower.modalities == ("video",)
    one = read_model_with(tmp_path, mtp_num_hidden_layers=1).mtp
    assert 2 * one > m.mtp > one > 0


def read_model_with(folder, **text):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(config))
    return read_model(str(folder))


def test_linears_that_stay_in_16_bits(tmp_path):
    """Gates of a delta net, a latent vector's projection that vLLM absorbs, and what is narrow."""
    states = read_model(tiny(tmp_path / "a", "qwen3_5_text", num_hidden_layers=4, head_dim=32, **DELTA_NET))
    assert {len(block.linears) for block in states.blocks} == {6, 7}  # without in_proj_a and in_proj_b
    wide = {"kv_lora_rank": 64, "q_lora_rank": 32, "first_k_dense_replace": 9, "num_key_value_heads": 4}
    latent = read_model(tiny(tmp_path / "b", "deepseek_v3", num_hidden_layers=1, **wide))
    assert len(latent.blocks[0].linears) == 7  # q_a, q_b, kv_a, o; gate, up, down; not kv_b
    narrow = tiny(tmp_path / "c", "llama", num_hidden_layers=1, head_dim=8, num_key_value_heads=2)
    assert sorted(n for n, _ in read_model(narrow).linears) == [32, 64, 64, 96, 96]  # keys and values have 16 outputs


def test_blocks_that_differ(tmp_path):
    """Memory is that of the largest block; hours are those of all."""
    model = tiny(
        tmp_path, "nemotron_h", hybrid_override_pattern="M-M*", head_dim=32, mamba_num_heads=4, mamba_head_dim=32
    )
    m = read_model(model)
    assert [block.count for block in m.blocks] == [2, 1, 1]
    assert m.heaviest == max((block.linears for block in m.blocks), key=lambda shapes: sum(n * k for n, k in shapes))
    assert m.blocks[1] == Block(1, ((96, 64), (64, 96)), ((96, 64), (64, 96)))
    once = plan(model)
    more = plan(
        tiny(tmp_path, "nemotron_h", hybrid_override_pattern="M-M*M", head_dim=32, mamba_num_heads=4, mamba_head_dim=32)
    )
    assert more["quantize_device_bytes"] == once["quantize_device_bytes"]
    for hours in ("quantize_cpu_seconds", "quantize_gpu_seconds"):
        assert once[hours] < more[hours] < 2 * once[hours]


def test_memory_of_the_host_is_that_of_the_widest_block():
    m = read_model(NEMOTRON_8B)
    _, mlp, attention = m.blocks
    assert quantize_host_bytes(m) != quantize_host_bytes(m._replace(blocks=[attention]))
    assert quantize_host_bytes(m) == quantize_host_bytes(m._replace(blocks=[mlp]))


def test_rotations_of_windows_have_a_table_of_their_own(tmp_path):
    m = read_model(tiny(tmp_path, "gemma3_text", num_hidden_layers=6, head_dim=32, max_position_embeddings=1000))
    assert m.rotations == 2 * 1000 * 32
    assert read_model(QWEN35).rotations == 262144 * 256


def test_ignored_linears_stay_in_16_bits(tmp_path, capsys):
    model = tiny(tmp_path, "llama", num_hidden_layers=2, head_dim=32)
    all_of_them, without = plan(model), plan(model, ignore=["re:.*[.]down_proj", "model.layers.0.self_attn.q_proj"])
    left = 2 * 64 * 96 + 128 * 64
    assert without["other_bytes"] - all_of_them["other_bytes"] == 2 * left
    assert without["linear_bytes"] < all_of_them["linear_bytes"]
    assert main(["plan", model, "--ignore", "re:.*[.]down_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["other_bytes"] - all_of_them["other_bytes"] == 2 * 2 * 64 * 96
    assert "--ignore nothing: no Linear of the blocks has such a name" in refusal(capsys, model, "--ignore", "nothing")
    assert "--ignore: nothing is left to quantize" in refusal(capsys, model, "--ignore", "re:.*")
    assert "--ignore: " in refusal(capsys, model, "--ignore", "re:(")


def test_heads_that_predict_further_tokens_of_unknown_size_are_named(tmp_path):
    model = tiny(
        tmp_path, "nemotron_h", hybrid_override_pattern="M-*", head_dim=32, mamba_num_heads=4, mamba_head_dim=32
    )
    assert not any("MTP" in line for line in plan(model)["assumptions"])
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "the bytes of an MTP head, which config.json names, are not counted" in plan(model)["assumptions"]


@pytest.mark.parametrize(
    ("row", "config", "options"),
    [
        ("Qwen3.5-27B", QWEN35, {}),
        ("Gemma 4 31B", GEMMA4, {}),
        ("Nemotron-H-8B", NEMOTRON_8B, {}),
        ("Nemotron-H-56B", NEMOTRON_56B, {}),
        ("Qwen2.5-VL-72B, tables in 4 bits", QWEN25VL, {"embed_bits": 4, "head_bits": 4}),
        ("Qwen2.5-VL-72B, `--language-model-only`", QWEN25VL, {"language_model_only": True}),
    ],
)
def test_the_table_in_the_docs(row, config, options):
    assert docs_row(row, plan(config, **options)) in (CONFIGS.parent.parent / "docs" / "plan.md").read_text()


def docs_row(row, found):
    states, windows = (found[f"{kind}_bytes_per_sequence"]["auto"] / 1e6 for kind in ("state", "window"))
    kept = f"{states:.0f} MB of states" if states else (f"{windows:.0f} MB of windows" if windows else "")
    tokens = [str(found["tokens_that_fit"][name]) for name in ("auto", "int8_per_token_head")]
    cells = [row, f"{found['card_weight_bytes'] / 2**30:.1f} GiB", kept, *tokens]
    return f"| {' | '.join(cells)} |"


def test_a_model_of_any_size_is_planned_without_its_memory(tmp_path):
    config = tiny(tmp_path, "llama", num_hidden_layers=1, intermediate_size=1 << 44)
    assert {tensor.device.type for tensor in plain_skeleton(config).state_dict().values()} == {"meta"}


def test_buffers_have_values_where_they_are_asked_for(tmp_path):
    (built,) = {b.device.type for b in plain_skeleton(tiny(tmp_path, "llama"), buffers=True).buffers()}
    assert built == "cpu"
