"""Tiny random models that see: `families.WITH_IMAGES` with processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from families import settings, write
from transformers import AutoTokenizer

MARKS = ["<image>", "<boi>", "<eoi>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
MARKS += [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
VOCABULARY = 261 + len(MARKS)
SQUARE = {"height": 16, "width": 16}

# Architecture -> its image processor and what it is given, what its processor has besides, and its configuration.
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "CLIPImageProcessorPil", {"size": {"shortest_edge": 16}, "crop_size": SQUARE},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"vision_config": {"num_hidden_layers": 3}},
    ),
    "llava_next": (
        "LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": 16}, "crop_size": SQUARE, "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "vision_config": {"num_hidden_layers": 3}},
    ),
    "qwen2_vl": (
        "Qwen2VLImageProcessorPil", {"patch_size": 8, "min_pixels": 256, "max_pixels": 1024}, {},
        {"vision_start_token_id": 264, "video_token_id": 265},
    ),
    "qwen2_5_vl": (
        "Qwen2VLImageProcessorPil", {"patch_size": 8, "min_pixels": 256, "max_pixels": 1024}, {},
        {"vision_start_token_id": 264, "video_token_id": 265},
    ),
    "gemma3": (
        "Gemma3ImageProcessorPil", {"size": SQUARE}, {"image_seq_length": 4},
        {"mm_tokens_per_image": 4, "vision_config": {"vision_use_head": False}},
    ),
    "smolvlm": (
        "SmolVLMImageProcessorPil", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        {"image_seq_len": 1}, {"scale_factor": 2},
    ),
    "idefics3": (
        "Idefics3ImageProcessorPil", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        {"image_seq_len": 1}, {"scale_factor": 2},
    ),
}  # fmt: skip


def write_seeing(name: str, tokenizer: Path, folder: Path) -> Path:
    """A random model of an architecture that takes pictures."""
    kind, of_image, of_processor, own = SEEING[name]
    config = settings(name)
    text = config["text_config"] | {"vocab_size": VOCABULARY}
    own = own | {"vision_config": config["vision_config"] | own.get("vision_config", {})}
    write(name, tokenizer, folder, text_config=text, image_token_id=261, image_token_index=261, **own)
    mark = "<boi>" if name == "gemma3" else "<image>"
    extra = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    made = AutoTokenizer.from_pretrained(folder, extra_special_tokens=extra)
    made.add_special_tokens({"additional_special_tokens": MARKS})
    assert made.convert_tokens_to_ids("<image>") == 261
    made.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ '" + mark + "' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    made.save_pretrained(folder)
    getattr(transformers, kind)(**of_image).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(of_processor))
    return folder
