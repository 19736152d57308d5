"""SwiftKV and its distillation written a second time, plainly, to test against: no sharing, no gathering, no chunks.
At the end, where answers are in a conversation, by rendering it over and over.

Two whole passes, all logits, every formula spelled out from the papers for one sample at a time. Only the vision tower
and the projector, which SwiftKV leaves alone, are the model's own.
"""

import os
from typing import Any

import torch
from torch import Tensor

from vlskv_ray.data.collate import IGNORE_INDEX, Batch
from vlskv_ray.model.wrappers import llava_next


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rope(x: Tensor, theta: float) -> Tensor:
    """x[T, heads, E] at positions 0..T-1; angles in float32, as transformers makes them."""
    length, _, size = x.shape
    frequencies = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos = torch.cat([angles, angles], -1).cos().to(x.dtype)[:, None]
    sin = torch.cat([angles, angles], -1).sin().to(x.dtype)[:, None]
    rotated = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    return x * cos + rotated * sin


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal; queries[T, H, E], keys and values[T, K, E], head h reading key/value head h // (H / K)."""
    length, heads, size = queries.shape
    repeat = heads // keys.shape[1]
    output = torch.empty_like(queries)
    for head in range(heads):
        scores = queries[:, head] @ keys[:, head // repeat].T / size**0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        output[:, head] = torch.softmax(scores, -1) @ values[:, head // repeat]
    return output.reshape(length, heads * size)


def text_model(weights: dict[str, Tensor], config: Any, x: Tensor, swiftkv: bool) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] after the final norm and entering the last layer, of embeddings x[T, D]."""
    eps, size = config.rms_norm_eps, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    n, group = config.num_key_value_layers, config.key_value_group_size

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def heads(name: str, x: Tensor, norm: str) -> Tensor:
        states = linear(name, x).unflatten(-1, (-1, size))
        return rms_norm(states, weights[norm], eps) if norm in weights else states

    source, last = None, x
    for i in range(config.num_hidden_layers):
        last = x
        layer, mine = f"layers.{i}", ""
        attn = f"{layer}.self_attn"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        if swiftkv and i >= n:
            if i == n:
                source = rms_norm(x, weights["norm_swiftkv.weight"], eps)
            leader = f"layers.{n + (i - n) // group * group}.self_attn"
            mine, kv_of, kv_input = "_swiftkv", leader, source
        else:
            kv_of, kv_input = attn, normed
        assert kv_input is not None
        queries = rope(heads(f"{attn}.q_proj{mine}", normed, f"{attn}.q_norm.weight"), theta)
        keys = rope(heads(f"{kv_of}.k_proj{mine}", kv_input, f"{kv_of}.k_norm.weight"), theta)
        values = heads(f"{kv_of}.v_proj{mine}", kv_input, "")
        x = x + linear(f"{attn}.o_proj", attention(queries, keys, values))
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = linear(f"{layer}.mlp.gate_proj", normed)
        x = x + linear(f"{layer}.mlp.down_proj", gate * torch.sigmoid(gate) * linear(f"{layer}.mlp.up_proj", normed))
    return rms_norm(x, weights["norm.weight"], eps), last


def embeddings(model: Any, batch: Batch) -> Tensor:
    """[B, T, D] with image features in place of their placeholders."""
    x = model.get_input_embeddings()(batch.input_ids)
    if images := llava_next.model_inputs(model.config, batch):
        pixels, sizes = images["pixel_values"].to(x.dtype), images["image_sizes"]
        features = model.get_image_features(pixels, sizes).pooler_output
        x[batch.input_ids == model.config.image_token_id] = torch.cat(list(features)).to(x.dtype)
    return x


def distillation(
    model: Any,
    batch: Batch,
    *,
    temperature: float,
    vision_loss_weight: float = 1.0,
    text_loss_weight: float = 1.0,
    hidden_loss_weight: float = 0.0,
) -> tuple[Tensor, int, dict[str, float]]:
    """The loss summed over a batch with its graph, the supervised tokens, and the other sums by name."""
    backbone = model.model.language_model
    weights, config = dict(backbone.named_parameters()), backbone.config
    head = model.lm_head.weight
    total, count = torch.zeros((), dtype=head.dtype), 0
    names = ("kl_vision", "kl_text", "teacher_ce", "student_ce", "top1", "hidden")
    sums = dict.fromkeys(names, 0.0)
    inputs = embeddings(model, batch).detach()
    for sample in range(len(batch.sample_ids)):
        length = int(batch.attention_mask[sample].sum())
        x = inputs[sample, :length]
        teacher, teacher_last = text_model(weights, config, x, swiftkv=False)
        student, student_last = text_model(weights, config, x, swiftkv=True)
        teacher_logits, student_logits = (teacher @ head.T).detach(), student @ head.T
        vision = bool(batch.has_image[sample])
        weight = vision_loss_weight if vision else text_loss_weight
        for t in range(length - 1):
            target = int(batch.labels[sample, t + 1])
            if target == IGNORE_INDEX:
                continue
            p = torch.softmax(teacher_logits[t] / temperature, -1)
            q = torch.softmax(student_logits[t] / temperature, -1)
            kl = (p * (p / q).log()).sum()
            hidden = ((student_last[t] - teacher_last[t].detach()) ** 2).mean()
            total = total + weight * (temperature**2 * kl + hidden_loss_weight * hidden)
            count += 1
            sums["kl_vision" if vision else "kl_text"] += kl.item()
            sums["teacher_ce"] -= torch.log_softmax(teacher_logits[t], -1)[target].item()
            sums["student_ce"] -= torch.log_softmax(student_logits[t], -1)[target].item()
            sums["top1"] += float(teacher_logits[t].argmax() == student_logits[t].argmax())
            sums["hidden"] += hidden.item()
    return total, count, sums


def rendered_by_prefixes(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans of the assistant's turns, the tokens that end them included."""

    def text_of(count: int, **options: Any) -> str:
        return processor.apply_chat_template(messages[:count], tokenize=False, **options) if count else ""

    full, spans = text_of(len(messages)), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, opened, upto = text_of(i), text_of(i, add_generation_prompt=True), text_of(i + 1)
            assert full.startswith(upto) and upto.startswith(before)
            spans.append((max(len(before), len(os.path.commonprefix([full, opened]))), len(upto)))
    (start, end), tokenizer = spans[-1], processor.tokenizer
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    if end == len(full) and not any(token in full[start:] for token in special):
        full += tokenizer.eos_token
        spans[-1] = (start, len(full))
    return full, [(start, start + length_to_stop(full[start:end], special)) for start, end in spans]


def length_to_stop(turn: str, special: list[str]) -> int:
    """Characters of a turn up to the end of the first special token in it, one character after the other."""
    for at in range(len(turn)):
        for token in special:
            if turn[at:].startswith(token):
                return at + len(token)
    return len(turn)
