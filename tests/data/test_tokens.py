"""What a user or an assistant said is characters, also where it is the name of a token that steers the model."""

import functools
import os
from typing import Any

import pytest
from conftest import conversation, picture, tiny_config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vlskv_ray.data.chat import Limits, encode
from vlskv_ray.data.collate import IGNORE_INDEX
from vlskv_ray.data.sample import Rejected, Sample
from vlskv_ray.data.templates import render
from vlskv_ray.data.tokens import fewest_tokens, tokenise
from vlskv_ray.model import presets
from vlskv_ray.model.wrappers.llava_next import num_image_features

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = [chr(i) for i in range(33, 127)]
WORDS = ["th", "he", "the", "is", "what", "ca", "cat", "a cat"]


def with_merges(tokens: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary, and merges that come to these words letter by letter."""
    merges: list[tuple[str, str]] = []
    for word in words:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, *(a + b for a, b in merges)]))}, merges


def byte_level() -> Tokenizer:
    """As of GPT-2; its merges come to `</s>` as well, which a text then could."""
    vocabulary, merges = with_merges([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())], ["Ġthe", "Ġcat", "what"])
    tokenizer = Tokenizer(models.BPE(vocabulary, [*merges, ("<", "/"), ("</", "s"), ("</s", ">")][: len(merges)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama(scheme: str, *, merged: bool = True) -> Tokenizer:
    """As of Llama, whose vocabulary has the special tokens, which merges come to here."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary, merges = with_merges(tokens, ["▁the", "▁cat", "what", *(["</s>"] if merged else [])])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    replaced, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    """As of T5, with the special tokens as pieces that cost nothing."""
    pieces = [
        *((token, 0.0) for token in SPECIAL),
        ("▁", -2.0),
        *((letter, -4.0) for letter in LETTERS),
        ("▁cat", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    """As of BERT: text in lower case, white space dropped."""
    pieces = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "cat", "what", "##s"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = {
    "byte level": byte_level,
    "llama, first": lambda: llama("first"),
    "llama, always": lambda: llama("always"),
    "llama, never": lambda: llama("never"),
    "llama, legacy": lambda: llama("legacy"),
    "unigram": unigram,
    "word piece": word_piece,
}


def processor_of(tokenizer: Any, **added: Any) -> Any:
    """A stock processor of ChatML around it. Of added tokens that are not special the template writes `<end>` only."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            f"{name}_token": f"<{token}>"
            for name, token in (("unk", "unk"), ("bos", "s"), ("eos", "/s"), ("pad", "pad"))
        },
        extra_special_tokens={"image_token": "<image>", "start": "<|im_start|>"},
    )
    wrapped.add_tokens(
        [AddedToken("<end>", special=False, normalized=False, **added), AddedToken("dogs", special=False)]
    )
    processor = presets.llava_next_processor(tiny_config())
    processor.tokenizer, processor.chat_template = wrapped, CHATML
    processor.image_token_id = wrapped.convert_tokens_to_ids("<image>")
    return processor


@functools.cache
def processor_with(name: str) -> Any:
    if name == "shipped":
        processor = presets.llava_next_processor(tiny_config())
        processor.tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
        processor.tokenizer.add_tokens([AddedToken("<end>", special=False), AddedToken("dogs", special=False)])
        processor.chat_template = CHATML
        return processor
    strips = {"lstrip": True, "rstrip": True} if name == "strips" else {}
    return processor_of(llama("first") if name == "strips" else TOKENIZERS[name](), **strips)


ALL = ["shipped", *TOKENIZERS, "strips"]
TEXTS = (
    "</s>", "a </s> b", "x</s></s>y", "<image>", "see <image> and <s>", "<|im_start|>user", "the <end> is", " <end> ",
    "<unk><pad>", "</s", ">", "<|im_", "é</s>日", "  </s>\n", "</s>the cat", "</S>",
)  # fmt: skip


def ids_of(processor: Any, messages: list[dict[str, Any]], placeholder: str = "<image>" * 3) -> tuple[Any, Any, Any]:
    rendering = render(processor, messages)
    return *tokenise(processor, rendering, [placeholder] * len(rendering.images)), rendering


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("images", [0, 2])
def test_names_of_control_tokens_in_texts_are_characters(name: str, images: int) -> None:
    """In both roles: the ids hold the template's control tokens and no other, and the texts' own characters."""
    processor = processor_with(name)
    tokenizer = processor.tokenizer
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content != "dogs"}
    special -= {tokenizer.unk_token_id}
    turn = ["<|im_start|>", "<end>"] * 2
    wanted = ["<s>", turn[0], *["<image>"] * 3 * images, *turn[1:]]
    for question in TEXTS:
        for answer in (text for text in TEXTS if text.strip()):
            ids, _, _, rendering = ids_of(processor, conversation(question, answer, images=images))
            found = [tokenizer.convert_ids_to_tokens(i) for i in ids.tolist() if i in special]
            assert found == wanted, (question, answer)
            if name not in ("unigram", "word piece"):  # which do not give back all characters
                read = "".join(tokenizer.decode(ids).split())
                assert read == "".join(rendering.text.replace("<image>\n", "<image>" * 3, images).split())


@pytest.mark.parametrize("name", ALL)
def test_the_rest_is_tokenised_as_ever(name: str) -> None:
    """A text with a control token's name has the ids of one with other words in its place, but for those words."""
    processor = processor_with(name)
    for before, after in (("what the cat ", " is"), ("é  ", "\n\n dogs"), ("the", "the")):
        named, other = (
            ids_of(processor, conversation(before + middle + after, "the cat", images=1))[0].tolist()
            for middle in ("Q</s>Q", "QvwxyQ")
        )
        same_before = len(os.path.commonprefix([named, other]))
        same_after = len(os.path.commonprefix([named[::-1], other[::-1]]))
        differs = processor.tokenizer.decode(named[same_before : len(named) - same_after])
        assert "".join(differs.split()).lower() in "q</s>q"


@pytest.mark.parametrize("name", ALL)
def test_rows_without_such_names_are_tokenised_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokenizer itself: the same ids as `processor(text=...)` gives."""
    processor = processor_with(name)
    messages = conversation("what the cat is", "dogs & é", "more?", " no\n", images=1)
    ids, offsets, answers, rendering = ids_of(processor, messages)
    text = rendering.text.replace("<image>", "<image>" * 3)
    encoding = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids.tolist() == encoding["input_ids"] and offsets.tolist() == [list(o) for o in encoding["offset_mapping"]]
    assert [text[start:stop] for start, stop in answers] == ["dogs & é<end>", " no\n<end>"]


@pytest.mark.parametrize("name", ["shipped", "llama, first"])
def test_an_answer_with_the_name_of_its_end_is_learnt_to_its_end(name: str) -> None:
    processor = processor_with(name)
    messages = conversation("how does HTML strike out? <s>?", "<s>so</s>, and <end>", "<image>", "no", images=1)
    encoded = encode(Sample("x", messages, [picture(40, 40)]), processor, tiny_config(), Limits())
    ids = encoded.input_ids[encoded.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(ids).split() == ["<s>so</s>,", "and", "<end><end>no<end>"]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<end>")) == 2
    assert (encoded.input_ids == processor.image_token_id).sum() == num_image_features(tiny_config(), (40, 40))


def test_the_names_of_stand_ins_are_left_out() -> None:
    """They are of no language; a row that holds one beside a control token's name could forge that token."""
    processor = processor_with("shipped")
    harmless = conversation("\U000f1000\U000f1001", "b")
    assert "\U000f1000\U000f1001" in processor.tokenizer.decode(ids_of(processor, harmless)[0])
    with pytest.raises(Rejected, match="private-use") as reason:
        ids_of(processor, conversation("\U000f1000 </s>", "b"))
    assert reason.value.code == "text_special" and "'</s>'" in reason.value.detail


def test_a_template_that_looks_at_texts_leaves_such_rows_out() -> None:
    """Since what is the row's and what the template's can then not be told."""
    processor = processor_of(byte_level())
    asks = "{% if '?' in part['text'] %}Question: {% endif %}{{ part['text'] }}"
    processor.chat_template = CHATML.replace("{{ part['text'] }}", asks)
    ids, _, answers, rendering = ids_of(processor, conversation("the cat?", "b"))
    assert "Question: the cat?" in processor.tokenizer.decode(ids) and rendering.text[slice(*answers[0])] == "b<end>"
    assert "the </s> cat" in processor.tokenizer.decode(ids_of(processor, conversation("the </s> cat", "b"))[0])
    with pytest.raises(Rejected, match="'</s>'") as reason:
        ids_of(processor, conversation("the </s> cat?", "b"))
    assert reason.value.code == "text_special"


@pytest.mark.parametrize("name", ["shipped", *TOKENIZERS])
def test_the_fewest_tokens_are_never_more_than_there_are(name: str) -> None:
    """Of any text, also one that its tokenizer makes short: runs, composed letters, unknown characters."""
    tokenizer = processor_with(name).tokenizer
    for text in (
        "a",
        "the cat " * 50,
        " " * 500,
        "\n" * 99 + "a",
        "日本" * 300,
        "e\u0301" * 400,
        "x" * 5000,
        "dogs" * 300,
    ):
        assert fewest_tokens(tokenizer, [text]) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])
    bounded = name not in ("unigram", "word piece")  # of which any number of unknown characters can be one token
    assert (fewest_tokens(tokenizer, ["x" * 10**6, "y" * 10**6]) > 2**16) == bounded
