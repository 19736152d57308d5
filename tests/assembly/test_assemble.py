"""A text model and a vision tower made into one model: on texts it is the text model, of pictures it takes any."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from waiting import HANG_SECONDS

from vlskv_ray import assemble, generate, train
from vlskv_ray.assembly import text_model as text_model_module
from vlskv_ray.assembly.assemble import TEXTS, logits_on_texts
from vlskv_ray.assembly.vision_tower import write_tower
from vlskv_ray.model.build import build_student, find_model, load_config
from vlskv_ray.model.processor import load_processor

CHATML = (  # as SmolLM2's: it takes texts alone, and adds a system turn
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "help<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def vocabulary() -> list[str]:
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def text_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Of bytes and a pair of them, without an image token."""
    tokens = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(tokens, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=chat_template,
    )


def text_model(kind: str = "llama", **options: Any) -> Any:
    torch.manual_seed(5)
    config = CONFIG_MAPPING[kind](**(SIZES | {"vocab_size": len(vocabulary()), "tie_word_embeddings": True} | options))
    return AutoModelForCausalLM.from_config(config).eval()


def text_folder(folder: Path, kind: str = "llama", chat_template: str | None = CHATML, **options: Any) -> Path:
    text_model(kind, **options).save_pretrained(folder)
    text_tokenizer(chat_template).save_pretrained(folder)
    return folder


def assembled(text: Path | str, output: Path, *options: str) -> Path:
    status = assemble.main(["--text", str(text), "--output", str(output), *map(str, options)])
    assert status == 0
    return output


NEW = ("--image-size", "32", "--patch-size", "8", "--vision-width", "32", "--vision-layers", "2")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_on_texts_it_is_the_text_model(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Logits, chat template, and where an answer ends; whichever text model and whether or not its head is its
    embeddings."""
    text = text_folder(tmp_path / "text", kind, tie_word_embeddings=kind in ("llama", "qwen2"))
    folder = assembled(text, tmp_path / "teacher", *NEW)
    said = capsys.readouterr().out
    assert "embeddings 260 -> 320" in said and "are the text model's" in said

    before = AutoModelForCausalLM.from_pretrained(text)
    own = AutoTokenizer.from_pretrained(text)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    for wanted, found in zip(logits_on_texts(before, own), logits_on_texts(model, processor.tokenizer), strict=True):
        assert torch.allclose(found[:, :260], wanted, atol=1e-5)
        mean = wanted.mean(dim=1, keepdim=True)  # a new row's logit is the mean of all, as its embedding is
        assert torch.allclose(found[:, 260:], mean.expand(-1, 60), atol=1e-4)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == before.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == 2

    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for options in ({}, {"add_generation_prompt": True}):
        wanted = own.apply_chat_template(messages, tokenize=False, **options)
        assert processor.apply_chat_template(messages, tokenize=False, **options) == wanted
        assert processor.apply_chat_template(parts, tokenize=False, **options) == wanted
    parts[0]["content"].insert(0, {"type": "image"})
    with_image = processor.apply_chat_template(parts, tokenize=False)
    assert with_image == own.apply_chat_template(messages, tokenize=False).replace("Hello", "<image>\nHello")


def test_it_sees_a_picture_and_becomes_a_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = assembled(text_folder(tmp_path / "text"), tmp_path / "teacher", *NEW, "--grid", "1x1", "1x2")
    (tmp_path / "picture.png").write_bytes(picture(40, 50))
    asked = ["--model", str(folder), "--teacher", "--prompt", "What is this?", "--max-new-tokens", "2"]
    assert generate.main([*asked, "--image", str(tmp_path / "picture.png")]) == 0
    assert "(36 of images)" in capsys.readouterr().out  # 16 of the whole, and 16 and 4 newlines of the one tile

    files = find_model(str(folder))
    assert load_config(files).image_grid_pinpoints == [[32, 32], [32, 64]]
    student = build_student(files, 2)  # N = L - 1: untrained, it is its teacher
    ids = load_processor(files).tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    backbone = student.get_decoder()
    with torch.inference_mode():
        on = student(input_ids=ids).logits
        backbone.config.swiftkv = False
        off = student(input_ids=ids).logits
    assert torch.allclose(on, off, atol=1e-5)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp has them: pairs that are rotated together stand side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: gguf.GGMLQuantizationType | None = None) -> None:
    """A llama as a GGUF file, by the library that defines the format; matrices that it fits in this type."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary()) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            weight = permuted(weight, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored = names.get_name(name, try_suffixes=(".weight",))
        if kind is not None and weight.ndim == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(stored, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    """Its weights are those that were written, the rotation of its heads included."""
    model = text_model(hidden_size=32, num_attention_heads=4)
    write_gguf(tmp_path / "model.gguf", model, text_tokenizer())
    folder = assembled(tmp_path / "model.gguf", tmp_path / "teacher", *NEW)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    found = AutoModelForImageTextToText.from_pretrained(folder)
    own = text_tokenizer()
    for text in TEXTS:
        assert processor.tokenizer(text)["input_ids"] == own(text)["input_ids"]
    for wanted, logits in zip(logits_on_texts(model, own), logits_on_texts(found, processor.tokenizer), strict=True):
        assert torch.allclose(logits[:, :260], wanted, atol=1e-4)
    assert str(tmp_path) not in (folder / "config.json").read_text()


def test_a_quantised_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Becomes plain weights, which nothing calls quantised any more. Packages to read it by are named if they lack."""
    model, file, output = text_model(), tmp_path / "model.gguf", tmp_path / "teacher"
    write_gguf(file, model, text_tokenizer(), gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.setattr(text_model_module, "GGUF_PACKAGES", ("gguf", "no_such_package", "nor_this"))
    assert assemble.main(["--text", str(file), "--output", str(output)]) == 2
    told = "reading a GGUF file takes the packages no_such_package and nor_this, not installed here: pip install"
    assert f"--text: {file}: {told} 'vlskv_ray[gguf]'\n" == capsys.readouterr().err
    monkeypatch.undo()
    found = AutoModelForImageTextToText.from_pretrained(assembled(file, output, *NEW))
    assert "quantization" not in (output / "config.json").read_text()
    for name, wanted in model.model.state_dict().items():
        weight = found.model.language_model.state_dict()[name][: len(wanted)]
        assert weight.dtype == torch.float32 and torch.allclose(weight, wanted, atol=wanted.abs().max() / 127)


def clip_folder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(6)
    CLIPModel(
        CLIPConfig(text_config=sizes | {"vocab_size": 60}, vision_config=sizes | {"image_size": 32, "patch_size": 8})
    ).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.5, 0.25, 0.125], image_std=[0.75, 0.5, 0.25]).save_pretrained(folder)
    return folder


def siglip_folder(folder: Path) -> Path:
    torch.manual_seed(7)
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder)
    SiglipImageProcessorPil(image_mean=[0.5, 0.25, 0.125], image_std=[0.75, 0.5, 0.25]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("make", "tower_class"), [(clip_folder, CLIPModel), (siglip_folder, SiglipVisionModel)])
def test_a_tower_that_people_have(
    tmp_path: Path, make: Callable[[Path], Path], tower_class: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights and the scale of its pixels; a whole CLIP gives its vision tower."""
    tower = make(tmp_path / "tower")
    folder = assembled(text_folder(tmp_path / "text"), tmp_path / "teacher", "--vision", str(tower))
    assert "the projector is untrained" in capsys.readouterr().out
    whole = tower_class.from_pretrained(tower)
    wanted = getattr(whole, "vision_model", whole).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    found = model.model.vision_tower.state_dict()
    assert wanted and all(
        any(name.endswith(key) and torch.equal(found[name], value) for name in found) for key, value in wanted.items()
    )
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert list(processor.image_processor.image_mean) == [0.5, 0.25, 0.125]
    assert list(processor.image_processor.image_std) == [0.75, 0.5, 0.25]
    assert model.config.image_grid_pinpoints == [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == ("default" if make is clip_folder else "full")


def trained_tower(tmp_path: Path, text: Path) -> tuple[Path, Any]:
    """A model whose projector has learnt something, and the folder that its tower and projector are written into."""
    whole = assembled(text, tmp_path / "whole", *NEW, "--grid", "1x1", "1x2", "--seed", "3")
    model = AutoModelForImageTextToText.from_pretrained(whole)
    processor = AutoProcessor.from_pretrained(whole, backend="pil")
    tower = tmp_path / "tower"
    write_tower(model, processor.image_processor.to_dict() | {"image_mean": [0.5, 0.25, 0.125]}, tower, torch.float32)
    return tower, model


def test_a_tower_with_its_trained_projector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sees as the model did that both were trained in: the same features of the same tiles."""
    text = text_folder(tmp_path / "text")
    tower, before = trained_tower(tmp_path, text)
    capsys.readouterr()
    folder = assembled(text, tmp_path / "again", "--vision", str(tower))
    assert "its projector is trained" in capsys.readouterr().out
    after = AutoModelForImageTextToText.from_pretrained(folder)
    assert after.config.vision_feature_layer == before.config.vision_feature_layer == -1
    assert after.config.image_grid_pinpoints == before.config.image_grid_pinpoints == [[32, 32], [32, 64]]
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    assert list(processor.image_processor.image_mean) == [0.5, 0.25, 0.125]
    wanted = before.state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in after.state_dict().items())
    other = assembled(text, tmp_path / "other", "--vision", str(tower), "--grid", "1x1")
    assert AutoModelForImageTextToText.from_pretrained(other).config.image_grid_pinpoints == [[32, 32]]


def test_a_projector_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One trained for another text model, and a file that is none; without the file a new one is drawn."""
    tower, _ = trained_tower(tmp_path, text_folder(tmp_path / "text"))
    wider = text_folder(tmp_path / "wider", hidden_size=64)
    asked = ["--text", str(wider), "--vision", str(tower), "--output", str(tmp_path / "out")]
    for told in ("model.image_newline is [32]; wanted [64] for this text model", "is no trained projector: "):
        capsys.readouterr()
        assert assemble.main(asked) == 2
        error = capsys.readouterr().err
        assert f"{tower}/projector.safetensors: {told}" in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()
        (tower / "projector.safetensors").write_bytes(b"nothing")
    (tower / "projector.safetensors").unlink()
    assembled(wider, tmp_path / "out", "--vision", str(tower))
    assert "the projector is untrained" in capsys.readouterr().out


TAKES_PARTS = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_which_chat_template_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that renders pictures stays as it is; of others every character is kept; one can be given."""
    own = text_folder(tmp_path / "parts", chat_template=TAKES_PARTS)
    folder = assembled(own, tmp_path / "own", *NEW)
    assert (folder / "chat_template.jinja").read_text() == TAKES_PARTS
    indented = text_folder(tmp_path / "indented", chat_template="\n  Chat:\n" + CHATML)
    processor = AutoProcessor.from_pretrained(assembled(indented, tmp_path / "wrapped", *NEW), backend="pil")
    messages = [{"role": "user", "content": "Hello"}]
    wanted = AutoTokenizer.from_pretrained(indented).apply_chat_template(messages, tokenize=False)
    assert wanted.startswith("\n  Chat:\n")
    assert processor.apply_chat_template(messages, tokenize=False) == wanted
    base = text_folder(tmp_path / "base", chat_template=None)
    assert assemble.main(["--text", str(base), "--output", str(tmp_path / "none")]) == 2
    assert "--chat-template: " in capsys.readouterr().err and not (tmp_path / "none").exists()
    (tmp_path / "given.jinja").write_text(CHATML)
    for template, begins in (("plain", "<|im_start|>USER:\n"), (str(tmp_path / "given.jinja"), "<|im_start|>system")):
        output = tmp_path / f"with-{Path(template).stem}"
        processor = AutoProcessor.from_pretrained(
            assembled(base, output, *NEW, "--chat-template", template), backend="pil"
        )
        assert processor.apply_chat_template(messages, tokenize=False).startswith(begins)


def test_what_cannot_be_assembled_is_one_line_and_nothing_is_written(
    tmp_path: Path, teacher_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = text_folder(tmp_path / "text")
    other = text_folder(tmp_path / "gemma", "gemma2")
    (tmp_path / "no.gguf").write_bytes(b"GGML and more")
    (tmp_path / "there").mkdir()
    whole = teacher_folder()
    bare = clip_folder(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    for arguments, told in (
        (["--text", tmp_path / "missing"], f"--text: there is no folder '{tmp_path}/missing'"),
        (["--text", tmp_path / "missing.gguf"], "--text: {}/missing.gguf: there is no such file"),
        (["--text", tmp_path / "no.gguf"], "is no GGUF file: it does not begin with the letters GGUF"),
        (["--text", other], "is a 'gemma2', whose SwiftKV form is not proven exact; supported: llama, mistral"),
        (["--text", whole], "is a vision-language model already"),
        (["--text", "shapes-teacher"], "is a vision-language model already"),
        (["--text", text, "--vision", text], "is a 'llama'; wanted a vision tower: clip, clip_vision_model, siglip"),
        (["--text", text, "--vision", bare], "has no preprocessor_config.json"),
        (["--text", text, "--output", tmp_path / "there"], "--output: {}/there is there already"),
        (["--text", text, "--image-size", 50], "--image-size: 50; wanted a multiple of the --patch-size 8"),
        (["--text", text, "--vision-width", 40], "--vision-width: 40; wanted a multiple of 32"),
        (
            ["--text", text, "--image-size", 512, "--patch-size", 1],
            "--patch-size: 1 makes 262,144 patches of a picture",
        ),
        (["--text", text, "--chat-template", tmp_path / "no"], "--chat-template: {}/no cannot be read"),
    ):
        output = ["--output", tmp_path / "out"] if "--output" not in arguments else []
        assert assemble.main([*map(str, arguments), *map(str, output)]) == 2, arguments
        error = capsys.readouterr().err
        assert told.replace("{}", str(tmp_path)) in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))


def test_a_damaged_text_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF file that is cut short anywhere, weights that are missing or no numbers: one line, and nothing is written.

    Whatever is drawn in place of missing weights, and whatever comes of those that are no numbers, equals itself.
    """
    text = text_folder(tmp_path / "text")
    write_gguf(tmp_path / "whole.gguf", text_model(), text_tokenizer())
    whole = (tmp_path / "whole.gguf").read_bytes()
    cases = []
    for num_bytes in (4, 24, 3000, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"{num_bytes}.gguf").write_bytes(whole[:num_bytes])
        cases.append((tmp_path / f"{num_bytes}.gguf", f"GGUF file, which has {num_bytes:,} bytes here; was it cut"))
    (tmp_path / "nan.gguf").write_bytes(whole[:-4000] + b"\xff" * 4000)
    cases.append((tmp_path / "nan.gguf", "nan.gguf: its logits on texts are no numbers: weights of it are damaged"))
    weights = load_file(text / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, text / "model.safetensors", {"format": "pt"})
    cases.append((text, "1 of its weights are missing, such as model.layers.1.mlp.up_proj.weight"))
    for model, told in cases:
        assert assemble.main(["--text", str(model), "--output", str(tmp_path / "out"), *NEW]) == 2, model
        error = capsys.readouterr().err
        assert error.startswith(f"--text: {model}: ") and told in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("hello", "writes 0 image tokens for 1 images"),
        ("{% for m in messages %}{{ m['content'] ", "does not take this conversation: unexpected end of template"),
        (
            CHATML.replace("message['content']", "(message['content'] if loop.last else '...')"),
            "writes message 2 of a ",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_called_by_its_option(
    tmp_path: Path, template: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own or given, with what can be given in its place; nobody is sent to the command that they have called."""
    (tmp_path / "given.jinja").write_text(template)
    own, other = text_folder(tmp_path / "own", chat_template=template), text_folder(tmp_path / "other")
    for arguments, whose in (
        (["--text", own], f"that of {own}"),
        (["--text", other, "--chat-template", tmp_path / "given.jinja"], "it"),
    ):
        assert assemble.main([*map(str, arguments), "--output", str(tmp_path / "out"), *NEW]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"--chat-template: {whose} cannot be used: ") and told in error, error
        assert error.endswith(
            "; another can be given as a file, or 'plain' for turns that begin with USER: and ASSISTANT:\n"
        )
        assert "vlskv-ray assemble" not in error and not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_one_line(tmp_path: Path) -> None:
    """Nothing is left of what was begun. The limit of a file's size stands for the disk's."""
    text = text_folder(tmp_path / "text")
    options = ["--text", str(text), "--output", str(tmp_path / "out"), *NEW]
    limited = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); \
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); \
from vlskv_ray import assemble; raise SystemExit(assemble.main({options!r}))"
    ended = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: --output: the model cannot be written: ") and last.endswith("nothing is left of it")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".writing*"))


def test_whoever_has_a_text_model_is_told_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a vision-language model is wanted."""
    text = text_folder(tmp_path / "text")
    for name in (text, tmp_path / "model.gguf"):
        (tmp_path / "run.yaml").write_text(
            f"model: {{name_or_path: {name}}}\ndata: {{sources: [{{name: shapes}}]}}\noutput: {{dir: {tmp_path}}}\n"
        )
        assert train.main(["--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert f"`vlskv-ray assemble --text {name} --output DIR`" in error and error.count("\n") == 1, error


def test_a_chat_template_of_texts_alone_is_told_what_it_must_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = assembled(text_folder(tmp_path / "text"), tmp_path / "teacher", *NEW)
    (folder / "chat_template.jinja").write_text(CHATML)
    assert generate.main(["--model", str(folder), "--teacher", "--prompt", "Hello"]) == 2
    capsys.readouterr()
    (tmp_path / "run.yaml").write_text(
        f"model: {{name_or_path: {folder}}}\ndata: {{sources: [{{name: shapes}}]}}\noutput: {{dir: {tmp_path}}}\n"
    )
    assert train.main(["--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}" in error, error
    assert error.count("\n") == 1
