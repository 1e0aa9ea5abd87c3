"""Pretrains the tiny model from nothing: tokenizer, training loop, measured quality, a Hugging Face folder.

Not here: the corpus (`corpus.py`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from t2ray.core import Message
from t2ray.tiny.corpus import LAST_SHARES, LATER_SHARES, SHARES, SYSTEM, Corpus, answers, load, messages

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

STEPS = 2_400
LATER, LAST = 0.375, 0.25  # as many steps follow, with other shares of the tasks
BATCH = 40  # conversations
CHUNK = 8  # rows per forward pass; a batch is sorted by length, so that a chunk has little padding
LEARNING_RATE = 1e-2  # of the layers' matrices, by Muon
EMBEDDING_RATE = 5e-3  # of the embedding and the norms, by AdamW
LATER_RATE, LAST_RATE = 0.6, 0.5  # of both
WARMUP = 100

# --------------------------------------------------------------------------------------------- the tokenizer, the model


def build_tokenizer(corpus: Corpus, vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: it encodes any text without loss, and every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message.text for chat in corpus.draw(4_000) for message in chat if message != SYSTEM]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns a freshly initialised Llama of 0.86 M parameters."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=64)
    return model


# --------------------------------------------------------------------------------------------------------- the training


def encode(tokenizer: PreTrainedTokenizerFast, chats: list[tuple[Message, ...]]) -> list[list[int]]:
    """Returns the token ids of each conversation, as the chat template renders it."""
    texts = [BOS + "".join(f"<|{m.role}|>{m.text}{END}" for m in chat) for chat in chats]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def padded(tokenizer: PreTrainedTokenizerFast, rows: list[list[int]]) -> Tensor:
    """Returns tokens_BT, padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def answer_tokens(tokenizer: PreTrainedTokenizerFast, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Returns which tokens belong to an answer of the assistant's, its end among them, and which to the last one."""
    *_, assistant = roles = tokenizer.convert_tokens_to_ids(list(ROLES))
    role_BT = torch.isin(tokens_BT, torch.tensor(roles))
    start_BT = (torch.arange(tokens_BT.shape[1]) * role_BT).cummax(-1).values  # where the message of a token starts
    spoken_BT = ~role_BT & (tokens_BT != tokenizer.pad_token_id)
    answer_BT = spoken_BT & (tokens_BT.gather(-1, start_BT) == assistant)
    return answer_BT, answer_BT & (start_BT == start_BT[:, -1:])


def optimizers(model: torch.nn.Module, scale: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the layers, and AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=scale * LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=scale * EMBEDDING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, times a cosine that falls to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def fit(
    model: torch.nn.Module, parts: Callable[[], Iterator[Tensor]], steps: int, scale: float, log: Callable[[str], None]
) -> None:
    """Trains a model: a step follows the sum of the losses that `parts` yields; logs the loss and the time left.

    `scale` is a factor of the learning rates.
    """
    opts = optimizers(model, scale)
    schedules = [LambdaLR(opt, lambda step: rate(step, steps)) for opt in opts]
    model.train()
    started, recent = time.monotonic(), 0.0
    for step in range(steps):
        for loss in parts():
            torch.autograd.backward(loss)
            recent += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            opt.zero_grad()
            schedule.step()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - started
            left = spent / (step + 1) * (steps - step - 1)
            log(f"step {step + 1}/{steps}  loss {recent / 50:.4f}  {spent:.0f} s, {left:.0f} s left")
            recent = 0.0


def as_ids(rows: list[int], tokens_BT: Tensor) -> dict[str, Tensor]:
    """Returns what a model of texts gets."""
    return {"input_ids": tokens_BT}


def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[tuple[Message, ...]],
    inputs: Callable[[list[int], Tensor], dict[str, Tensor]] = as_ids,
) -> Iterator[Tensor]:
    """Yields the loss of the answers' tokens, the mean over all of them, in parts of like length.

    `inputs` returns what the model gets of some conversations, by their indices, and their tokens.
    """
    ids = encode(tokenizer, chats)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = [order[start : start + CHUNK] for start in range(0, len(ids), CHUNK)]
    tokens = [padded(tokenizer, [ids[i] for i in part]) for part in parts]
    learned = [answer_tokens(tokenizer, tokens_BT)[0][:, 1:] for tokens_BT in tokens]
    count = sum(int(learned_BT.sum()) for learned_BT in learned)
    for part, tokens_BT, learned_BT in zip(parts, tokens, learned, strict=True):
        # padding on the right needs no mask: attention is causal
        hidden_BTD = model.model(**inputs(part, tokens_BT[:, :-1]), use_cache=False).last_hidden_state
        logits_NV, targets_N = model.lm_head(hidden_BTD[learned_BT]), tokens_BT[:, 1:][learned_BT]
        yield torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum") / count


# ---------------------------------------------------------------------------------------------------------- the quality


@torch.no_grad()
def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    split: str = "validation",
    count: int = 200,
    before: tuple[Message, ...] = (),
) -> dict[str, dict[str, float]]:
    """Returns three measures per task, as means over rows; `before` is what was said before a row's request.

    `some` is the probability of an answer that is right in some format, `wanted` that of one in the wanted format; both
    are exact, from the model's probability of each right text with its end token. `greedy` is how often the greedy
    answer is right in the wanted format.
    """
    model.eval()
    quality = {}
    for task in LAST_SHARES:
        rows = load(task, split)
        rows = rows[:: max(1, len(rows) // count)]
        some, wanted, greedy = 0.0, 0.0, 0.0
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            forms = [answers(task, row) for row in part]
            for index in range(len(forms[0])):
                chats = [
                    (*before, *messages(task, row), Message(role="assistant", content=form[index]))
                    for row, form in zip(part, forms, strict=True)
                ]
                p, best = likelihood(model, tokenizer, chats)
                some += float(p.sum())
                if index == len(forms[0]) - 1:
                    wanted, greedy = wanted + float(p.sum()), greedy + float(best.sum())
        quality[task] = {"some": some / len(rows), "wanted": wanted / len(rows), "greedy": greedy / len(rows)}
    return quality


def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: list[tuple[Message, ...]], **seen: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns each last answer's probability, (B,), and whether each of its tokens is the likeliest one, (B,).

    `seen` is what the model gets besides ids.
    """
    tokens_BT = padded(tokenizer, encode(tokenizer, chats))
    last_BT = answer_tokens(tokenizer, tokens_BT)[1][:, 1:]
    logp_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False, **seen).logits.log_softmax(-1)
    targets_BT = tokens_BT[:, 1:]
    logp_BT = logp_BTV.gather(-1, targets_BT[..., None])[..., 0]
    best_BT = logp_BTV.argmax(-1) == targets_BT
    return (logp_BT * last_BT).sum(-1).exp(), (best_BT | ~last_BT).all(-1)


# -------------------------------------------------------------------------------------------------------------- the job


def pretrain(
    out: Path, *, seed: int = 0, steps: int = STEPS, log: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Trains the model and writes it to the folder `out`, in place of one there; returns its quality (`measure`)."""
    torch.manual_seed(seed)
    corpus = Corpus(seed)
    tokenizer = build_tokenizer(corpus)
    model = build_model(tokenizer)
    log(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {steps} steps of {BATCH} conversations")

    def drawn(shares: Mapping[str, float]) -> Callable[[], Iterator[Tensor]]:
        return lambda: losses(model, tokenizer, corpus.draw(BATCH, shares))

    fit(model, drawn(SHARES), steps, 1.0, log)
    fit(model, drawn(LATER_SHARES), round(LATER * steps), LATER_RATE, log)
    fit(model, drawn(LAST_SHARES), round(LAST * steps), LAST_RATE, log)
    quality = measure(model, tokenizer)
    for task, row in quality.items():
        log(f"{task:10s} right in some format {row['some']:.3f}, in the wanted one {row['wanted']:.3f}, "
            f"greedy {row['greedy']:.3f}")  # fmt: skip
    save((model, tokenizer), out)
    return quality


def save(parts: Sequence[Any], out: Path, **files: Any) -> None:
    """Writes the parts of a Hugging Face folder beside `out`, with JSON files by name, and renames it into place."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    for part in parts:
        part.save_pretrained(fresh)
    for name, value in files.items():
        (fresh / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors gives its files to their owner alone
    if out.exists():
        shutil.rmtree(out)
    fresh.rename(out)
