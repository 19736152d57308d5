"""Every way to generate: fast prefill gives what the dense student gives, which runs all positions through all layers.

Tokens and logits are compared, and the tokens counted that ran the upper layers: those whose logits were asked for.
A student could agree with itself and be wrong, so an untrained one with N = L - 1, which is the teacher, is compared
with that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import batch_of, encoded_samples, tiny_config
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlskv_ray.model.swiftkv import swiftkv_backbone

NEW = 5
"""Tokens generated for each prompt."""

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral", {"sliding_window": 16}),  # shorter than each prompt
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-mixed": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "full", "full", "sliding", "sliding")],
        },
    ),
}


@dataclass
class Prompts:
    """Inputs of `generate`; all longer than the window."""

    image: dict[str, Tensor]
    images: dict[str, Tensor]
    """Two, of different sizes."""
    text: dict[str, Tensor]
    padded: dict[str, Tensor]
    """Two of text, of which the first is padded on the left."""


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    encoded = encoded_samples()
    ids = torch.tensor([[*range(40, 62), *range(40, 50)]])  # the end comes earlier too, for prompt lookup
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.ones_like(ids).repeat(2, 1)}
    padded["input_ids"][0, :7], padded["attention_mask"][0, :7] = 3, 0
    return Prompts(*(batch_of(encoded[at : at + 1]).model_inputs(tiny_config()) for at in (0, 2)), text, padded)


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    """Models by what they are, for all tests of this file."""
    return {}


@pytest.fixture
def model_of(student: Callable[..., Any], built: dict[str, Any]) -> Callable[..., Any]:
    def of(backbone: str, num_hidden_layers: int = 6, **options: Any) -> Any:
        key = f"{backbone}{num_hidden_layers}{sorted(options.items())}"
        if key not in built:
            model_type, text = BACKBONES[backbone]
            built[key] = student(model_type, text=text | {"num_hidden_layers": num_hidden_layers}, **options)
        return built[key]

    return of


# ---------------------------------------------------------------------------------------------------------- the modes
def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(5)
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    asked = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **lengths, **options}
    return model.generate(**inputs, **asked)


def of_image(**options: Any) -> Callable[..., Any]:
    return lambda model, prompts, assistant: generate(model, prompts.image, **options)


def of_text(**options: Any) -> Callable[..., Any]:
    return lambda model, prompts, assistant: generate(model, prompts.text, **options)


def of_images(model: Any, prompts: Prompts, assistant: Any) -> Any:
    return generate(model, prompts.images)


def left_padded(**options: Any) -> Callable[..., Any]:
    return lambda model, prompts, assistant: generate(model, prompts.padded, **options)


def second_turn(model: Any, prompts: Prompts, assistant: Any) -> Any:
    """A question about an image, then one about two more, on top of the cache of the first."""
    return next_turn(model, prompts, generate(model, prompts.image))


def second_turn_by_static_cache(model: Any, prompts: Prompts, assistant: Any) -> Any:
    cache = StaticCache(config=model.config.text_config, max_cache_len=250)
    return next_turn(model, prompts, generate(model, prompts.image, past_key_values=cache))


def next_turn(model: Any, prompts: Prompts, first: Any) -> Any:
    ids = torch.cat([first.sequences, prompts.images["input_ids"]], 1)
    inputs = prompts.images | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generate(model, inputs, past_key_values=first.past_key_values)


def embeddings(model: Any, prompts: Prompts, assistant: Any) -> Any:
    with torch.no_grad():
        text = model.get_input_embeddings()(prompts.padded["input_ids"])
    return generate(model, {"inputs_embeds": text, "attention_mask": prompts.padded["attention_mask"]})


def guided(model: Any, prompts: Prompts, assistant: Any) -> Any:
    """Away from another prompt, for all of which `generate` asks for logits."""
    return generate(model, prompts.image, guidance_scale=1.5, negative_prompt_ids=prompts.text["input_ids"])


def assisted(**options: Any) -> Callable[..., Any]:
    def mode(model: Any, prompts: Prompts, assistant: Any) -> Any:
        settings = assistant.generation_config
        settings.num_assistant_tokens, settings.assistant_confidence_threshold = CANDIDATES, 0
        return generate(model, prompts.text, assistant_model=assistant, **options)

    return mode


STATIC = {"cache_implementation": "static"}
BY_FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}  # the backend that needs no package
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20}
CANDIDATES = 3

MODES: dict[str, Callable[[Any, Prompts, Any], Any]] = {
    "greedy": of_image(),
    "sampling": of_image(**SAMPLING),
    "beams": of_image(num_beams=3),
    "several sequences": of_image(num_return_sequences=3, **SAMPLING),
    "several images": of_images,
    "left padding": left_padded(),
    "left padding, beams": left_padded(num_beams=2),
    "static cache": of_image(**STATIC),
    "static cache, far longer": of_image(**STATIC, max_cache_len=200),
    "static cache, beams": of_image(**STATIC, num_beams=3),
    "static cache, left padding": left_padded(**STATIC),
    "static cache, chunks": of_text(**STATIC, prefill_chunk_size=9),
    "static cache, second turn": second_turn_by_static_cache,
    "quantized cache": of_image(**BY_FP8),
    "quantized cache, beams": of_image(**BY_FP8, num_beams=3),
    "chunks": of_text(prefill_chunk_size=9),
    "prompt lookup": of_text(prompt_lookup_num_tokens=CANDIDATES),
    "assistant": assisted(),
    "assistant, sampling": assisted(**SAMPLING),
    "second turn": second_turn,
    "embeddings": embeddings,
    "guidance": guided,
    "repetition penalty": of_image(repetition_penalty=1.3),
    "no cache": of_image(use_cache=False),
}

MOST_IN_A_PASS = {
    "prompt lookup": 1 + CANDIDATES,
    "assistant": 1 + CANDIDATES,
    "assistant, sampling": 1 + CANDIDATES,
    "guidance": 32,
}
"""Tokens whose logits a mode asks for at a time, where that is not one."""


# ------------------------------------------------------------------------------------------------------- what is seen
@contextmanager
def dense(model: Any) -> Iterator[None]:
    """All positions are run: without the hook that tells the backbone which are needed."""
    hooks = dict(model._forward_pre_hooks)
    assert len(hooks) == 1
    model._forward_pre_hooks.clear()
    try:
        yield
    finally:
        model._forward_pre_hooks.update(hooks)


@contextmanager
def counted(model: Any) -> Iterator[tuple[list[int], list[int]]]:
    """How many tokens of each sequence ran the last layer, and how many got logits, for each forward pass."""
    ran: list[int] = []
    asked: list[int] = []
    hooks = [
        swiftkv_backbone(model).layers[-1].mlp.register_forward_hook(lambda _, x, y: ran.append(x[0].shape[1])),
        model.lm_head.register_forward_hook(lambda _, x, y: asked.append(x[0].shape[1])),
    ]
    try:
        yield ran, asked
    finally:
        for hook in hooks:
            hook.remove()


def assert_same(answered: Any, wanted: Any) -> None:
    assert torch.equal(answered.sequences, wanted.sequences)
    assert len(answered.logits) == len(wanted.logits) >= 2
    for logits, wanted_logits in zip(answered.logits, wanted.logits, strict=True):
        assert torch.allclose(logits, wanted_logits, atol=1e-5)


def skip_impossible(backbone: str, mode: str) -> None:
    if BACKBONES[backbone][1] and "quantized" in mode:
        pytest.skip("transformers has no quantised cache for sliding windows")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_fast_is_dense(model_of: Callable[..., Any], prompts: Prompts, backbone: str, group: int, mode: str) -> None:
    """Where the dense student runs the prompt, it runs one token of it, or those whose logits are asked for."""
    skip_impossible(backbone, mode)
    model, assistant = model_of(backbone, key_value_group_size=group), model_of(backbone, num_key_value_layers=4)
    assert_fast_is_dense(model, assistant, prompts, mode)


@pytest.mark.parametrize("mode", MODES)
def test_fast_is_dense_by_eager_attention(model_of: Callable[..., Any], prompts: Prompts, mode: str) -> None:
    """Whose masks are numbers to add, and always there."""
    skip_impossible("mistral-window", mode)
    model = model_of("mistral-window", attn_implementation="eager", key_value_group_size=2)
    assert_fast_is_dense(model, model_of("mistral-window", num_key_value_layers=4), prompts, mode)


def assert_fast_is_dense(model: Any, assistant: Any, prompts: Prompts, mode: str) -> None:
    with dense(model), counted(model) as (all_ran, _):
        wanted = MODES[mode](model, prompts, assistant)
    with counted(model) as (ran, asked):
        answered = MODES[mode](model, prompts, assistant)
    assert_same(answered, wanted)
    assert ran == asked and max(ran) == MOST_IN_A_PASS.get(mode, 1)
    assert max(all_ran) > max(ran) and sum(all_ran) >= sum(ran) + 25


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_untrained_last_layer_is_the_teacher(
    model_of: Callable[..., Any], prompts: Prompts, backbone: str, mode: str
) -> None:
    """It takes its keys and values where the teacher does, by the teacher's weights."""
    skip_impossible(backbone, mode)
    model, assistant = (model_of(backbone, num_key_value_layers=5, moved=moved) for moved in (False, True))
    model.config.text_config.swiftkv = False
    try:
        wanted = MODES[mode](model, prompts, assistant)
    finally:
        model.config.text_config.swiftkv = True
    assert_same(MODES[mode](model, prompts, assistant), wanted)


def compiled_by_torch(model: Any, inputs: dict[str, Tensor]) -> Any:
    graphs: list[Any] = []

    def eager(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.forward = torch.compile(model.forward, backend=eager)
    answered = generate(model, inputs, max_new_tokens=2, min_new_tokens=2)
    del model.forward
    assert len(graphs) >= 2
    return answered


def compiled_by_generate(model: Any, inputs: dict[str, Tensor]) -> Any:
    """Each step after the first, as by itself on GPUs where the cache is static."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    answered = generate(model, inputs, **STATIC, compile_config=config, max_new_tokens=2, min_new_tokens=2)
    del model._compiled_call
    return answered


COMPILED = [
    (name, group, compiled_by_torch) for name in ("llama", "mistral-window", "qwen2", "qwen3") for group in (1, 2)
]
COMPILED += [(name, 2, compiled_by_generate) for name in ("llama", "mistral-window")]


@pytest.mark.parametrize(("backbone", "group", "way"), COMPILED)
def test_compiled_is_dense(
    model_of: Callable[..., Any], prompts: Prompts, backbone: str, group: int, way: Callable[..., Any]
) -> None:
    """Through `torch.compile`, with a backend that runs what was traced; of three layers, as tracing is slow."""
    model = model_of(backbone, num_hidden_layers=3, num_key_value_layers=1, key_value_group_size=group)
    with dense(model):
        wanted = generate(model, prompts.padded, max_new_tokens=2, min_new_tokens=2)
    with counted(model) as (ran, asked):
        answered = way(model, prompts.padded)
    torch.compiler.reset()
    assert_same(answered, wanted)
    assert ran == asked == [1, 1]


def test_attention_of_another_kind_runs_all(model_of: Callable[..., Any], prompts: Prompts) -> None:
    """What its masks are is not known here: all tokens are run, so that none sees what it should not."""
    model = model_of("llama", key_value_group_size=2)
    wanted = MODES["static cache"](model, prompts, None)
    AttentionInterface.register("of_another_kind", sdpa_attention_forward)
    AttentionMaskInterface.register("of_another_kind", sdpa_mask)
    model.set_attn_implementation({"text_config": "of_another_kind"})
    try:
        with counted(model) as (ran, _):
            assert_same(MODES["static cache"](model, prompts, None), wanted)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
    assert ran[0] == prompts.image["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------------ logits of any tokens
MARKED = torch.zeros(2, 32, dtype=torch.bool)
MARKED[0, [9, 20, 31]] = MARKED[1, [0, 5, 6, 7, 30]] = True

LOGITS_TO_KEEP: dict[str, tuple[int | torch.Tensor, int]] = {
    "last": (1, 1),
    "last three": (3, 3),
    "more than there are": (40, 32),
    "positions": (torch.tensor([31, 8, 8, 20]), 4),
    "from the end": (torch.tensor([-1, 9, -3]), 3),
    "one position": (torch.tensor([12]), 1),
    "of each": (torch.tensor([[31, 9], [0, 17]]), 2),
    "marked": (MARKED, 5),
    "marked in one": (MARKED & torch.tensor([[False], [True]]), 5),
    "marked nowhere": (MARKED & False, 1),
    "marked of all": (torch.arange(32) > 25, 32),  # 1-D: not by positions, so all are run
    "no position": (torch.tensor([], dtype=torch.int64), 32),
    "a single one": (torch.tensor(31), 32),
}
"""What is asked for of the left-padded prompts, and how many tokens of each sequence run the upper layers for it."""


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("asked", LOGITS_TO_KEEP)
@pytest.mark.parametrize("backbone", ["llama", "mistral-window"])
def test_logits_of_any_tokens(
    model_of: Callable[..., Any], prompts: Prompts, backbone: str, asked: str, cache: str
) -> None:
    """`logits_to_keep` in every form gives the dense student's, padded or not, and leaves the cache of all tokens."""
    model, (keep, num_run) = model_of(backbone, key_value_group_size=2), LOGITS_TO_KEEP[asked]

    def forward(attention_mask: Tensor | None) -> Any:
        text = model.config.text_config
        made = {"dynamic": DynamicCache(config=text), "static": StaticCache(config=text, max_cache_len=50)}.get(cache)
        options = {"past_key_values": made, "use_cache": made is not None, "attention_mask": attention_mask}
        with torch.no_grad():
            output = model(prompts.padded["input_ids"], **options, logits_to_keep=keep)
            then = None if made is None else model(torch.tensor([[7], [8]]), past_key_values=made, logits_to_keep=1)
        return output.logits, None if then is None else then.logits

    for attention_mask in (None, prompts.padded["attention_mask"]):
        with dense(model):
            wanted, wanted_then = forward(attention_mask)
        with counted(model) as (ran, _):
            logits, then = forward(attention_mask)
        assert logits.shape == wanted.shape and torch.allclose(logits, wanted, atol=1e-5)
        assert ran[0] == num_run
        assert then is None or torch.allclose(then, wanted_then, atol=1e-5)


def test_logits_of_tokens_that_are_not_there(model_of: Callable[..., Any], prompts: Prompts) -> None:
    """Are refused, not those of others."""
    model = model_of("llama", key_value_group_size=2)
    for keep in (torch.tensor([32]), torch.tensor([-33]), MARKED[:, 1:], MARKED[:1]):
        with pytest.raises((IndexError, RuntimeError)):
            model(prompts.padded["input_ids"], logits_to_keep=keep)
