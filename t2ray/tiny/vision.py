"""Pretrains the tiny vision model: LLaVA with a tiny CLIP as its eyes and the tiny model as its decoder.

First the decoder learns conversations about pictures that it need not see: a patch is the sum of the embeddings of the
words for what lies in it. Then the eyes learn to make such patches of pixels, and at last the decoder gets theirs.
Not here: the corpus (`vision_corpus.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from t2ray.core import Message, user
from t2ray.tasks import tiny_vision
from t2ray.tasks.tiny_vision import COLORS, SHAPES, SIZE, Scene, corner, painted
from t2ray.tiny import MODEL
from t2ray.tiny.pretrain import fit, likelihood, losses, save
from t2ray.tiny.vision_corpus import FORMS, MARK, PLACES, PROSE, Pictures

WORDS = (
    *SHAPES, *(f"{kind}s" for kind in SHAPES), *COLORS, "shape", "shapes", "color", "counts", "top", "bottom", "left",
    "right", "corner", "what", "which", "where", "does", "Answer", "image", "contain", "present",
    "question", "using", "single", "phrase", "yes", "no",
)  # fmt: skip
"""What becomes one token each, so that questions are short."""

SORTS = (SHAPES, tuple(COLORS), ("top", "bottom"), ("left", "right"))
"""Of each of these, one word is true of a shape."""
SHARP = 32  # so that a word's own embedding is far likelier than another's

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SIDE, PATCH = 32, 8  # pixels of a picture as the eyes get it, and of a patch
STEPS, BATCH, RATE = 2_400, 32, 1.0
EYE_STEPS, EYE_BATCH, EYE_RATE = 400, 128, 1.0
LAST_STEPS, LAST_RATE = 300, 0.3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tiny model's tokenizer with `WORDS` and a picture's mark."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, extra_special_tokens={"image_token": MARK})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Returns the tiny model, its embedding enlarged, with freshly initialised eyes: 0.97 M parameters."""
    decoder = AutoModelForCausalLM.from_pretrained(MODEL)
    known_VD = decoder.get_input_embeddings().weight.data
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    decoder.get_input_embeddings().weight.data[len(known_VD) :].normal_(std=float(known_VD.std()))
    eyes = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=64, initializer_factor=1.0, hidden_act="gelu",
    )  # fmt: skip
    decoder.config._name_or_path = ""  # else the folder says where it was made
    config = LlavaConfig(
        vision_config=eyes, text_config=decoder.config, image_token_index=tokenizer.convert_tokens_to_ids(MARK),
        image_seq_length=PLACES, vision_feature_layer=-1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(**decoder.generation_config.to_diff_dict())
    return model


def build_processor() -> CLIPImageProcessorPil:
    """Returns what makes pixels of a picture."""
    return CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


# --------------------------------------------------------------------------------------------------------- the training


def pixels(processor: CLIPImageProcessorPil, scenes: list[Scene]) -> Tensor:
    """Returns pictures as the model gets them, (B, 3, SIDE, SIDE)."""
    found: Tensor = processor([painted(drawn) for drawn in scenes], return_tensors="pt")["pixel_values"]
    return found


def contents(scenes: list[Scene]) -> list[tuple[int, int, tuple[str, ...]]]:
    """Returns what there is to see: (picture, patch, words) of each shape's centre, such as (0, 5, ("red", "circle",
    "top", "left")).
    """
    found = []
    for row, drawn in enumerate(scenes):
        for shape in drawn["shapes"]:
            kind, color, x, y, width, height = shape
            column, line = ((at + size // 2) * SIDE // SIZE // PATCH for at, size in ((x, width), (y, height)))
            found.append((row, line * (SIDE // PATCH) + column, (color, kind, *corner(shape).split())))
    return found


def imagined(embedding_VD: Tensor, tokenizer: PreTrainedTokenizerFast, scenes: list[Scene]) -> Tensor:
    """Returns what the decoder is to get of pictures, (B, P, D): at a shape's centre the sum of its words' embeddings,
    at every other patch the mark's embedding.
    """
    of = tokenizer.convert_tokens_to_ids
    patch_BPD = embedding_VD[of(MARK)].repeat(len(scenes), PLACES, 1)
    for row, patch, words in contents(scenes):
        patch_BPD[row, patch] = embedding_VD[of([*words])].sum(0)
    return patch_BPD


def eye_loss(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, images: Tensor,
             scenes: list[Scene]) -> Tensor:  # fmt: skip
    """Returns how far the eyes' patches are from the `imagined` ones.

    It is the mean squared error over the words' variance, of patches with a shape's centre plus of those without, plus
    the cross-entropy of each word among those of its sort: in the squared error alone the kind of a shape is a small
    part.
    """
    embedding_VD = model.get_input_embeddings().weight.detach()
    features = model.model.get_image_features(images, vision_feature_layer=-1, vision_feature_select_strategy="default")
    seen_BPD = torch.stack(list(features.pooler_output))
    wanted_BPD = imagined(embedding_VD, tokenizer, scenes)
    found = contents(scenes)
    shape_BP = torch.zeros(seen_BPD.shape[:2], dtype=torch.bool)
    shape_BP[[row for row, *_ in found], [patch for _, patch, _ in found]] = True
    scale = wanted_BPD[shape_BP].var()
    error_BP = (seen_BPD - wanted_BPD).square().mean(-1) / scale
    loss: Tensor = error_BP[shape_BP].mean() + error_BP[~shape_BP].mean()
    seen_SD = torch.stack([seen_BPD[row, patch] for row, patch, _ in found])
    for sort in SORTS:
        of_VD = embedding_VD[tokenizer.convert_tokens_to_ids([*sort])]
        said_S = torch.tensor([next(sort.index(word) for word in words if word in sort) for *_, words in found])
        loss = loss + cross_entropy(seen_SD @ of_VD.T / (scale * len(of_VD[0])) * SHARP, said_S)
    return loss


# ---------------------------------------------------------------------------------------------------------- the quality


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    processor: CLIPImageProcessorPil,
) -> dict[str, dict[str, float]]:
    """Returns three measures per task, as `pretrain.measure` does."""
    model.eval()
    quality = {}
    for task in tiny_vision.TASKS:
        part = tiny_vision.rows(task, "validation")[:200]
        images = pixels(processor, [row["scene"] for row in part])
        before, after = tiny_vision.FORMATS[task].split("{}")
        found = {}
        for form in (PROSE, *FORMS):
            chats = [
                (*user(MARK * PLACES + row["prompt"]), Message(role="assistant", content=form.format(answer)))
                for row in part
                for answer in [row["answer"].removeprefix(before).removesuffix(after)]
            ]
            found[form] = likelihood(model, tokenizer, chats, pixel_values=images)
        wanted, greedy = (float(value.float().mean()) for value in found[tiny_vision.FORMATS[task]])
        some = sum(float(p.mean()) for p, _ in found.values())
        quality[task] = {"some": some, "wanted": wanted, "greedy": greedy}
    return quality


# -------------------------------------------------------------------------------------------------------------- the job


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    eye_steps: int = EYE_STEPS,
    last_steps: int = LAST_STEPS,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, float]]:
    """Trains the model and writes it to the folder `out`, in place of one there; returns its quality (`measure`)."""
    torch.manual_seed(seed)
    corpus = Pictures(seed)
    tokenizer, processor = build_tokenizer(), build_processor()
    model = build_model(tokenizer)
    log(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {steps} steps of {BATCH} conversations")

    def talked(inputs: Callable[[Tensor, list[Scene]], dict[str, Tensor]]) -> Iterator[Tensor]:
        chats = corpus.draw(BATCH)
        return losses(
            model, tokenizer, [chat.messages for chat in chats],
            lambda rows, tokens_BT: inputs(tokens_BT, [drawn for i in rows for drawn in chats[i].scenes]),
        )  # fmt: skip

    def imagining(tokens_BT: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        embedding_VD = model.get_input_embeddings().weight
        embedded_BTD = embedding_VD[tokens_BT]
        mark_BT1 = (tokens_BT == tokenizer.convert_tokens_to_ids(MARK))[..., None]
        return {"inputs_embeds": embedded_BTD.masked_scatter(mark_BT1, imagined(embedding_VD, tokenizer, scenes))}

    def looking() -> Iterator[Tensor]:
        scenes = [corpus.scene() for _ in range(EYE_BATCH)]
        yield eye_loss(model, tokenizer, pixels(processor, scenes), scenes)

    def seeing(tokens_BT: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        return {"input_ids": tokens_BT} | ({"pixel_values": pixels(processor, scenes)} if scenes else {})

    fit(model, lambda: talked(imagining), steps, RATE, log)
    fit(model, looking, eye_steps, EYE_RATE, log)
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings()):
        part.requires_grad_(False)  # else the eyes forget the words, and the words move away from the eyes
    fit(model, lambda: talked(seeing), last_steps, LAST_RATE, log)
    quality = measure(model, tokenizer, processor)
    for task, row in quality.items():
        log(f"{task:10s} right in some format {row['some']:.3f}, in the wanted one {row['wanted']:.3f}, "
            f"greedy {row['greedy']:.3f}")  # fmt: skip
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    save((model, tokenizer, processor), out, processor_config=settings)
    return quality
