"""The architectures that t2ray is tested with from end to end: the tiniest configurations, with random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from t2ray.models.skeleton import model_class

VOCABULARY = 261
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3,
}  # fmt: skip
HEADS = {"head_dim": 8}
FULL = {"num_key_value_heads": 4}  # of an architecture that knows no groups
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_conv": 4}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip

# Architecture, as its configuration is called -> its page in the world, and what its configuration has besides.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 1 to 3", HEADS),
    "mistral": ("Mistral 7B", HEADS),
    "ministral": ("Ministral 8B", HEADS),
    "ministral3": ("Ministral 3", HEADS),
    "qwen2": ("Qwen 2, 2.5", {}),
    "qwen3": ("Qwen 3", HEADS),
    "qwen3_5_text": ("Qwen 3.5", HEADS | LINEAR | {"layer_types": ["linear_attention", "full_attention"]}),
    "gemma": ("Gemma 1", HEADS),
    "gemma2": ("Gemma 2", HEADS | {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma 3 1B", HEADS | {"query_pre_attn_scalar": 8}),
    "gemma3n_text": (
        "Gemma 3n",
        HEADS | {
            "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
            "altup_num_inputs": 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4_text": (
        "Gemma 4",
        HEADS | {
            "global_head_dim": 16, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4, "num_kv_shared_layers": 2, "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "phi": ("Phi 1, 2", {}),
    "phi3": ("Phi 3, 3.5, 4", {}),
    "gpt2": ("GPT-2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | FULL),
    "gpt_neo": (
        "GPT-Neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    ),
    "gpt_neox": ("GPT-NeoX, Pythia", FULL),
    "gptj": ("GPT-J", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 256}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32} | FULL),
    "falcon": ("Falcon", {"num_kv_heads": 4}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("MPT", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2}),
    "stablelm": ("StableLM 2", {}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", {"layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("Granite 3", {"logits_scaling": 8.0, "embedding_multiplier": 2.0}),
    "granitemoehybrid": (
        "Granite 4",
        LOCAL | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "logits_scaling": 4.0},
    ),
    "smollm3": ("SmolLM 3", {}),
    "cohere": ("Command R", {"logit_scale": 0.3}),
    "cohere2": ("Command R7B, A", HEADS | {"logit_scale": 0.2}),
    "exaone4": ("EXAONE 4", HEADS),
    "glm4": ("GLM-4", HEADS),
    "starcoder2": ("StarCoder 2", {}),
    "nemotron": ("Nemotron 4", HEADS),
    "seed_oss": ("Seed-OSS", HEADS),
    "lfm2": ("LFM 2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "falcon_h1": ("Falcon-H1", HEADS | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "bamba": ("Bamba", MAMBA | {"attn_layer_indices": [1]}),
    "mixtral": ("Mixtral", LOCAL),
    "qwen2_moe": ("Qwen 1.5, 2 MoE", MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen 3 MoE", HEADS | MOE),
    "qwen3_next": (
        "Qwen 3-Next",
        HEADS | MOE | LINEAR | {
            "shared_expert_intermediate_size": 24, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "olmoe": ("OLMoE", MOE | {"num_key_value_heads": 4}),
    "gpt_oss": ("gpt-oss", HEADS | LOCAL | {"layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek_v2": ("DeepSeek-V2", LATENT),
    "deepseek_v3": ("DeepSeek-V3, R1", LATENT),
    "glm4_moe": (
        "GLM-4.5 to 4.7",
        HEADS | {
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        },
    ),
    "granitemoe": ("Granite 3 MoE", LOCAL | {"logits_scaling": 4.0}),
    "minimax_m2": ("MiniMax-M2", HEADS | LOCAL | {"rotary_dim": 8}),
    "phimoe": ("Phi 3.5 MoE", LOCAL),
    "llama4_text": (
        "Llama 4",
        HEADS | LOCAL | {"intermediate_size_mlp": 48, "moe_layers": [1], "interleave_moe_layer_step": 2},
    ),
}  # fmt: skip

EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
       "patch_size": 8, "depth": 1, "num_heads": 2, "embed_dim": 16}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}

# As published with a vision tower -> its name in the world, its language decoder, what that and the tower have besides.
WITH_IMAGES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("LLaVA", "llama", {}, {"model_type": "clip_vision_model"}),
    "llava_next": ("LLaVA-NeXT", "llama", {}, {"model_type": "clip_vision_model"}),
    "qwen2_vl": ("Qwen 2-VL", "qwen2_vl_text", MROPE, {"hidden_size": 32}),
    "qwen2_5_vl": ("Qwen 2.5-VL", "qwen2_5_vl_text", MROPE, {"out_hidden_size": 32}),
    "qwen3_vl": ("Qwen 3-VL", "qwen3_vl_text", MROPE, {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}),
    "qwen3_5": ("Qwen 3.5 VL", "qwen3_5_text", {}, {"out_hidden_size": 32}),
    "gemma3": ("Gemma 3 4B to 27B", "gemma3_text", {}, {}),
    "gemma4": ("Gemma 4 (vision)", "gemma4_text", {},
               {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64}),
    "mistral3": ("Mistral Small 3.x", "mistral", {}, {"model_type": "pixtral"}),
    "smolvlm": ("SmolVLM", "llama", {}, {}),
    "idefics3": ("Idefics 3", "llama", {}, {}),
    "internvl": ("InternVL 3", "qwen2", {}, {"image_size": [16, 16], "patch_size": [8, 8]}),
    "llama4": ("Llama 4 (vision)", "llama4_text", {}, {"vision_output_dim": 16, "projector_input_dim": 16,
               "projector_output_dim": 16}),
}  # fmt: skip


def settings(name: str) -> dict[str, Any]:
    """The configuration of an architecture."""
    if name in FAMILIES:
        return SMALL | FAMILIES[name][1]
    _, decoder, text, eye = WITH_IMAGES[name]
    own = FAMILIES[decoder][1] if decoder in FAMILIES else HEADS
    text = {"model_type": decoder} | SMALL | own | text
    image = {key: 5 for key in ("image_token_id", "image_token_index")}
    return {"text_config": text, "vision_config": EYE | eye, "initializer_range": 0.3} | image


def tokenized(tokenizer: Path, folder: Path) -> Path:
    """Puts the tokenizer of another folder there."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder)
    return folder


def write(name: str, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.float32, **own: Any) -> Path:
    """A random model of an architecture with the tokenizer of another folder."""
    config = CONFIG_MAPPING[name](**(settings(name) | own))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = model_class(config).from_config(config)
        for parameter in hf.parameters():  # MoE routers and biases start at 0
            if not bool(parameter.any()):
                parameter.data.normal_(0, 0.1)
        if dtype != torch.float32:  # Llama 4 has complex numbers, which are cast with a warning
            hf.to(dtype)
        hf.save_pretrained(folder)
    return tokenized(tokenizer, folder)
