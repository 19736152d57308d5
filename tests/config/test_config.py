"""What a config file may say, what it comes to, and what is answered to a wrong one."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from vlskv_ray.config import Config, ConfigError, changed_keys, dump_config, load_config, load_config_and_notices
from vlskv_ray.config.options import PARTS, LearningRatesConfig, Trainable
from vlskv_ray.model import parts

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ORIGINAL = next(file for file in CONFIGS if file.stem == "small-llava-next-swiftkv-cpu")  # in the original layout
SMALL = "model: {name_or_path: small-llava-next}\ndata: {sources: [shapes]}\n"  # the least that is a run, in 2 lines


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Config:
    Path("run.yaml").write_text(text)
    return load_config("run.yaml", overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return list(caught.value.problems)


def notices(text: str) -> list[str]:
    Path("run.yaml").write_text(text)
    return list(load_config_and_notices("run.yaml")[1])


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_is_named_after_its_file(file: Path) -> None:
    config = load_config(file)
    assert config.output.name == file.stem
    assert config.model.name_or_path


def test_what_is_not_given_has_its_default() -> None:
    config = load(SMALL)
    assert (config.epochs, config.optimizer.lr, config.optimizer.betas) == (1, 2e-4, (0.9, 0.999))
    assert config.data.sources[0].name == "shapes"
    assert config.output.name == "run"
    assert config == load(SMALL + "optimizer:\noutput: {name: null}\n"), "an empty section holds its defaults"


def test_every_option_is_documented() -> None:
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        for name, option in section["properties"].items():
            assert option.get("description") or "$ref" in option, name  # a section is described by its class


def test_a_config_is_frozen_and_hashable() -> None:
    config = load(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 2
    assert {config: 1}[load(SMALL)] == 1


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("1e-4", 1e-4), ("5E+1", 50.0), (".5", 0.5), ("1.", 1.0), ("3", 3.0), ("+2.5e0", 2.5), ("010", 10.0)],
)
def test_numbers_are_those_of_yaml_1_2(value: str, wanted: float) -> None:
    assert load(SMALL + f"temperature: {value}\n").temperature == wanted
    assert load(SMALL, f"temperature={value}").temperature == wanted


@pytest.mark.parametrize("value", ["no", "on", "12:30:45", "2026-01-02", "0x1F", "0o17", "1_000", "'1e-4'", "'true'"])
def test_other_texts_stay_text(value: str) -> None:
    assert load(SMALL + f"output: {{name: {value}}}\n").output.name == value.strip("'")


@pytest.mark.parametrize("value", ["true", "True", "TRUE"])
def test_true_is_a_boolean(value: str) -> None:
    assert load(SMALL + f"output: {{order: {value}}}\n").output.order is True


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    Path("run.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_config("run.yaml").data.sources[0].name == "shapes"


def test_a_bare_source_is_a_path_or_a_name() -> None:
    Path("local").mkdir()
    Path("shapes").mkdir()
    sources = load(SMALL, "data.sources=[shapes, a/b, x.jsonl, 'd/*.txt', local, {name: c/d, weight: 2}]").data.sources
    assert [source.name for source in sources] == ["shapes", "a/b", None, None, None, "c/d"]
    assert [source.path and source.path.rpartition("/")[2] for source in sources[2:5]] == ["x.jsonl", "*.txt", "local"]


def test_paths_become_absolute_against_the_current_folder(tmp_path: Path) -> None:
    Path("teacher").mkdir()
    config = load(
        "model: {name_or_path: teacher}\n"
        "data: {sources: [{path: a/../*.jsonl, image_root: images}], cache_dir: cache}\n"
        "output: {dir: ~/runs}\n"
    )
    assert config.model.name_or_path == str(tmp_path / "teacher")
    assert config.data.sources[0].path == str(tmp_path / "*.jsonl")
    assert config.data.sources[0].image_root == str(tmp_path / "images")
    assert config.data.cache_dir == str(tmp_path / "cache")
    assert config.output.dir == str(Path("~/runs").expanduser())
    assert load(SMALL).output.dir == str(tmp_path / "runs"), "the default too"
    assert load(SMALL, "model.name_or_path=org/name").model.name_or_path == "org/name"
    assert load(SMALL, "model.name_or_path=./new").model.name_or_path == str(tmp_path / "new")


def test_the_global_batch_counts_one_worker_when_there_is_no_cluster() -> None:
    sizes = ("micro_batch_size=2", "gradient_accumulation_steps=3")
    assert load(SMALL, *sizes, "cluster.num_workers=4").global_batch_size == 24
    assert load(SMALL, *sizes, "cluster.num_workers=0").global_batch_size == 6


# --- Overrides --------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    text = SMALL + "optimizer: {lr: 1, eps: 1e-6}\n"
    config = load(
        text, "optimizer.lr=2", "--optimizer.lr=1e-3", "max_steps=7", "model.revision=", "cluster.address=a=b"
    )
    assert (config.optimizer.lr, config.optimizer.eps, config.max_steps) == (1e-3, 1e-6, 7)
    assert (config.model.revision, config.cluster.address) == (None, "a=b")


def test_overrides_reach_into_lists() -> None:
    config = load(
        SMALL,
        "data.sources.0.num_samples=5",  # of a source given as bare text
        "data.sources.1=b.jsonl",
        "data.sources.2.path=c.json",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.betas.1=0.95",
    )
    assert [(source.name, source.num_samples) for source in config.data.sources] == [
        ("shapes", 5),
        (None, None),
        (None, None),
    ]
    assert str(config.data.sources[2].path).endswith("/c.json")
    assert config.optimizer.betas == (0.8, 0.95)
    assert load("model: {name_or_path: x}", "data.sources.0=shapes").data.sources[0].name == "shapes"
    assert load(SMALL, "data.sources=[{name: a/b}]").data.sources[0].name == "a/b"


# --- Dump and compare -------------------------------------------------------------------------------------------------


def test_a_dumped_config_is_read_back_equal_from_a_file_of_another_name() -> None:
    config = load(
        SMALL,
        *(
            "optimizer.lr=1e-4",
            "optimizer.eps=1e-12",
            "seed=4294967295",
            "temperature=1e16",
            "optimizer.betas=[0, 1e-9]",
        ),
        *("model.revision='1e5'", "cluster.address='12'", "cluster.network_interface='no'", "output.name='ü: #x \"'"),
        *("data.sources=[shapes, {path: 'a b/*.json', weight: 0.1, image_root: \"a\\nb\"}]", "output.order=true"),
    )
    text = dump_config(config)
    Path("config.yaml").write_text(text)
    assert load_config("config.yaml") == config
    assert "\n  lr: 0.0001\n" in text
    assert Config.model_validate(json.loads(config.model_dump_json())) == config, "as stored in a checkpoint"


def test_a_dumped_config_gives_no_notices() -> None:
    config, of_the_file = load_config_and_notices(ORIGINAL)
    assert of_the_file
    Path("config.yaml").write_text(dump_config(config))
    assert load_config_and_notices("config.yaml") == (config, ())


def test_changed_keys_are_those_that_decide_the_numbers() -> None:
    a = load(SMALL)
    same = load(SMALL, "output.name=b", "checkpoint.every_steps=3", "cluster.num_workers=4", "data.num_proc=2")
    assert changed_keys(a, same) == {}
    assert changed_keys(a, load(SMALL, "model.gradient_checkpointing=true", "cluster.use_gpu=true")) == {}
    b = load(
        SMALL, "optimizer.lr=1", "seed=1", "data.sources.0.weight=2", "data.sources.1=a/b", "optimizer.betas=[0,0]"
    )
    expected = ["seed", "data.sources.0.weight", "data.sources.1", "optimizer.lr"]
    assert list(changed_keys(a, b)) == [*expected, "optimizer.betas.0", "optimizer.betas.1"]
    assert changed_keys(a, b)["optimizer.lr"] == (a.optimizer.lr, 1.0)


# --- Wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "run.yaml: is empty; wanted at least model.name_or_path and data.sources"),
        (b"# only this\n---\n", "run.yaml: is empty; wanted at least model.name_or_path and data.sources"),
        (b"- a\n", 'run.yaml:1: wanted keys such as `model:` at the top, got ["a"]'),
        (b"text\n", "run.yaml:1: wanted keys such as `model:` at the top, got 'text'"),
        (b"a: 1\nb: \xff\n", "run.yaml:2: not UTF-8 text; save the file as UTF-8"),
        (b"a: 1\nb: \0\n", r"run.yaml:2: the character '\x00' is not allowed in YAML"),
        (b"#" * (1 << 20) + b"\n", "run.yaml: larger than 1 MiB; wanted a YAML file of options"),
        (b"model:\n\tname_or_path: x\n", "run.yaml:2: a tab; YAML is indented with spaces"),
        (b"model: a: b\n", "run.yaml:1: not valid YAML: mapping values are not allowed here"),
        (b"a: [1\n", "run.yaml:2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (b"a: 1\n---\nb: 1\n", "run.yaml:2: not valid YAML: but found another document"),
        (b"? [a]\n: 1\n", "run.yaml:1: a key must be a word"),
        (b"a:\n- " + b"[" * 5000, "run.yaml:2: nested deeper than 20 levels"),
        (
            b"a: !!python/object:os.system x\n",
            "run.yaml:1: the tag tag:yaml.org,2002:python/object:os.system is not read; remove it",
        ),
        (
            b"a: 1\nb: @x\n",
            "run.yaml:2: not valid YAML: found character '@' that cannot start any token; put text that begins so in "
            "quotes",
        ),
    ]
    + [
        (
            text,
            "run.yaml:1: anchors (&) and aliases (*) are not read; write the value out, "
            "or put text that begins so in quotes",
        )
        for text in (b"a: &a [x, x]\nb: &b [*a, *a]\n", b"a: *.jsonl\n", b"a: *x\n", b"a: &a [*a]\n")
    ],
)
def test_a_file_that_holds_no_options_is_one_line(content: bytes, line: str) -> None:
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("run.yaml"))
    assert caught.value.problems == (line,)


def test_a_file_that_can_not_be_read_is_one_line() -> None:
    Path("folder").mkdir()
    for file, reason in (("missing.yaml", "No such file or directory"), ("folder", "Is a directory")):
        with pytest.raises(ConfigError, match=f"^{file}: can not be read: {reason}$"):
            load_config(file)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # wrong values: what was wanted, what was got
        ("epochs: '3'", "epochs: wanted an integer > 0, got '3'"),
        ("epochs: true", "epochs: wanted an integer > 0, got true"),
        ("epochs: 10.0", "epochs: wanted an integer > 0, got 10.0"),
        ("epochs: 0", "epochs: wanted an integer > 0, got 0"),
        ("epochs: [1]", "epochs: wanted an integer > 0, got [1]"),
        ("epochs:", "epochs: wanted an integer > 0, got null"),
        ("max_steps: -1", "max_steps: wanted an integer >= 0 or null, got -1"),
        ("seed: -1", "seed: wanted an integer >= 0 and < 4294967296, got -1"),
        ("temperature: true", "temperature: wanted a number > 0, got true"),
        ("temperature: .inf", "temperature: wanted a number > 0, got '.inf'"),
        ("temperature: 1e999", "temperature: wanted a number > 0, got Infinity"),
        ("text_loss_weight: -1", "text_loss_weight: wanted a number >= 0, got -1"),
        ("objective: dpo", "objective: wanted one of distill, sft, got 'dpo'"),
        ("{objective: sft, temperature: 3}", "temperature: has no effect with objective=sft; remove it"),
        ("evaluation: {every_steps: 0}", "evaluation.every_steps: wanted an integer > 0 or null, got 0"),
        ("cluster: 3", "cluster: wanted keys below it, got 3"),
        ("cluster: {address: 12}", "cluster.address: wanted text or null, got 12; put it in quotes"),
        ("cluster: {address: ''}", "cluster.address: wanted text or null, got ''"),
        ("output: {order: no}", "output.order: wanted true or false, got 'no'"),
        ("output: {level: INFO}", "output.level: wanted one of debug, info, warning, error, got 'INFO'"),
        ("scheduler: {warmup_ratio: 2}", "scheduler.warmup_ratio: wanted a number >= 0 and <= 1, got 2"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: wanted a list of 2 values, got [0.9]"),
        ("optimizer: {betas: [0.9, 0.9, 1]}", "optimizer.betas: wanted a list of 2 values, got [0.9, 0.9, 1]"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: wanted a number >= 0 and < 1, got 1"),
        ("optimizer: {type: sgd}", "optimizer.type: wanted adamw, got 'sgd'"),
        # values between fields
        (
            "{vision_loss_weight: 0, text_loss_weight: 0}",
            "text_loss_weight: 0 like vision_loss_weight: nothing would be learnt; raise one of them",
        ),
        ("output: {name: a/b}", "output.name: wanted the name of one folder, got 'a/b'; where it lies is output.dir"),
        ("output: {name: ..}", "output.name: wanted the name of one folder, got '..'; where it lies is output.dir"),
        (
            "output: {dir: 's3://x'}",
            "output.dir: wanted a path on this machine, got the URL 's3://x'; download it first",
        ),
        # unknown keys: the nearest one, the one that another trainer calls so, or all there are
        ("epoch: 1", "epoch: unknown key, did you mean epochs?"),
        ("lr: 1", "lr: unknown key, did you mean optimizer.lr?"),
        ("max_length: 1", "max_length: unknown key, did you mean data.max_length?"),
        ("learning_rate: 1", "learning_rate: unknown key, did you mean optimizer.lr?"),
        ("image_root: x", "image_root: unknown key, did you mean data.sources.0.image_root?"),
        ("scheduler: {tpye: linear}", "scheduler.tpye: unknown key, did you mean scheduler.type?"),
        ("image_dir: x", "image_dir: unknown key, did you mean data.sources.0.image_root?"),
        ("bf16: true", "bf16: unknown key, did you mean model.dtype?"),
        ("num_workers: 2", "num_workers: unknown key, did you mean cluster.num_workers?"),
        ("scheduler: {lr: 1}", "scheduler.lr: unknown key, did you mean optimizer.lr?"),
        ("output: {Log-Level: info}", "output.Log-Level: unknown key, did you mean output.level?"),
        ("checkpoint: {every_stesp: 1}", "checkpoint.every_stesp: unknown key, did you mean checkpoint.every_steps?"),
        ("checkpoint: {zzz: 1}", "checkpoint.zzz: unknown key; the keys here are every_steps, keep_last, keep_best, "),
        ("1: 2", "1: unknown key; the keys here are objective, seed, epochs, max_steps, micro_batch_size, "),
        ("tuna: {}", "tuna: unknown key, did you mean tune?"),
        ("sweeps: {}", "sweeps: unknown key; the keys here are objective, seed, epochs, max_steps, micro_batch_size, "),
        ("data.max_length: 5", "data.max_length: unknown key; in a file write `max_length:` indented below `data:`"),
        (
            r'"a\nb": 1',
            r"'a\nb': unknown key; the keys here are objective, seed, epochs, max_steps, micro_batch_size, ",
        ),
    ],
)
def test_a_wrong_option_is_told_with_its_line(text: str, line: str) -> None:
    if text.startswith("{"):  # several keys of the root, the last of which is complained about
        text = "\n".join(text.strip("{}").split(", "))
    number = len((SMALL + text).splitlines())
    (problem,) = problems(SMALL + text)
    assert (
        problem.startswith(f"run.yaml:{number}: {line}")
        if line.endswith(("_", " "))
        else problem == (f"run.yaml:{number}: {line}")
    )


SOURCE_KEYS = "name, path, image_root, format, weight, split, revision, num_samples, ignore_columns"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("{weight: 1}", [": wanted exactly one of name and path, got neither"]),
        ("{name: shapes, path: x.json}", [": wanted exactly one of name and path, got both"]),
        ("{path: x.json, split: val}", [".split: files have no splits; give the files of this split as path"]),
        ("{path: x.json, revision: a}", [".revision: only a hub dataset has revisions; remove it"]),
        ("{name: shapes, revision: a}", [".revision: only a hub dataset has revisions; remove it"]),
        (
            "{name: a/b, image_root: x, format: json}",
            [".image_root: only files have an image_root; remove it", ".format: only files have a format; remove it"],
        ),
        ("{path: x.json, image_dir: x}", [".image_dir: unknown key, did you mean data.sources.1.image_root?"]),
        ("{name: shapes, learning_rate: 2}", [f".learning_rate: unknown key; the keys here are {SOURCE_KEYS}"]),
        ("{name: shapes, wieght: 2}", [".wieght: unknown key, did you mean data.sources.1.weight?"]),
        ("{name: shapes, lr: 2}", [f".lr: unknown key; the keys here are {SOURCE_KEYS}"]),
        ("3", [": wanted keys below it, got 3"]),
    ],
)
def test_a_wrong_source_is_told_with_its_line(source: str, lines: list[str]) -> None:
    text = f"model: {{name_or_path: x}}\ndata:\n  sources:\n  - shapes\n  - {source}\n"
    assert problems(text) == [f"run.yaml:5: data.sources.1{line}" for line in lines]


def test_what_must_be_given_is_told() -> None:
    assert problems("model:\nepochs: 1\n") == [
        "run.yaml: data.sources: missing. The mixture, at least one source: samples with images and text-only ones "
        "may be mixed.",
        "run.yaml:1: model.name_or_path: missing. The teacher: a local folder, a hub id, or the name of a preset such "
        "as small-llava-next.",
    ]
    assert problems(SMALL, "data.sources=[]") == ["command line: data.sources: wanted a list of at least 1, got []"]


@pytest.mark.parametrize("options", [[], ["cluster.use_gpu=true"]])
def test_flash_attention_is_refused_with_a_reason(options: list[str]) -> None:
    """On GPUs too: no pass of a training would use it for text."""
    assert problems(SMALL, *options, "model.attn_implementation=flash_attention_2") == [
        "command line: model.attn_implementation: flash_attention_2 would do nothing for the text model; use sdpa, "
        "which on a GPU takes torch's own flash attention where that fits"
    ]


def test_bits_are_promised_of_cpus_only() -> None:
    assert problems(SMALL, "cluster.use_gpu=true", "cluster.bit_identical=true") == [
        "command line: cluster.bit_identical: no two runs on GPUs give the same bits; remove it or cluster.use_gpu"
    ]


def test_only_a_teacher_in_the_making_grows() -> None:
    assert problems(SMALL, "model.num_hidden_layers=8") == [
        "command line: model.num_hidden_layers: only objective=sft can add layers; remove it"
    ]
    assert load(SMALL, "model.num_hidden_layers=8", "objective=sft").model.num_hidden_layers == 8


def test_the_parts_that_train() -> None:
    """In one order, however they are given; every one of them has a learning rate of its own."""
    assert load(SMALL).trained_parts == ("swiftkv",)
    for options in ([], ["model.trainable=[all]"], ["model.trainable=[text,projector,vision_tower]"]):
        assert load(SMALL, "objective=sft", *options).trained_parts == ("vision_tower", "projector", "text")
    assert load(SMALL, "objective=sft", "model.trainable=[projector,vision_tower]").trained_parts == PARTS[:2]
    assert LearningRatesConfig.model_fields.keys() == {*PARTS}
    assert PARTS == parts.PARTS and {*PARTS, "all"} == {*get_args(Trainable)}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("model.trainable=[text]", "model.trainable: distillation trains swiftkv alone, got text; remove it"),
        ("model.trainable=[all]", "model.trainable: distillation trains swiftkv alone, got all; remove it"),
        (
            "objective=sft model.trainable=[tower]",
            "model.trainable.0: wanted one of vision_tower, projector, text, swiftkv, all, got 'tower'",
        ),
        ("objective=sft model.trainable=text", "model.trainable: wanted a list, got 'text'"),
        (
            "objective=sft model.trainable=[text,all]",
            "model.trainable: all holds every part of a plain model; give it by itself",
        ),
        (
            "objective=sft model.trainable=[text,swiftkv]",
            "model.trainable: swiftkv trains by itself, all else stays the teacher's; give no other part",
        ),
        (
            "objective=sft model.trainable=[projector] model.num_hidden_layers=9",
            "model.num_hidden_layers: layers are added to the text model, and only projector would train",
        ),
        (
            "objective=sft model.trainable=[projector] data.max_images_per_sample=0",
            "data.max_images_per_sample: 0, so that projector would have no image to learn from; raise it",
        ),
        (
            "objective=sft model.dtype=bfloat16",
            "model.dtype: has no effect with objective=sft where nothing is frozen; remove it, or name the parts that "
            "train in model.trainable",
        ),
        (
            "objective=sft model.trainable=[text] model.num_key_value_layers=2",
            "model.num_key_value_layers: has no effect with objective=sft; remove it",
        ),
        ("objective=sft model.start=fit", "model.start: has no effect with objective=sft; remove it"),
        (
            "model.start=copy model.fit_tokens=9",
            "model.fit_tokens: nothing is fitted with start=copy; use start=fit, or remove it",
        ),
        (
            "objective=sft model.trainable=[projector] optimizer.learning_rates.text=1",
            "optimizer.learning_rates.text: text does not train, but projector; remove it, or add text to "
            "model.trainable",
        ),
        (
            "optimizer.learning_rates={projector: 1}",
            "optimizer.learning_rates.projector: projector does not train, but swiftkv; remove it",
        ),
        (
            "objective=sft optimizer.learning_rates.swiftkv=1",
            "optimizer.learning_rates.swiftkv: swiftkv does not train, but vision_tower and projector and text; "
            "remove it",
        ),
        (
            "optimizer.learning_rates.tower=1",
            "optimizer.learning_rates.tower: unknown key; the keys here are vision_tower, projector, text, swiftkv",
        ),
        (
            "optimizer.learning_rates.swiftkv=0",
            "optimizer.learning_rates.swiftkv: wanted a number > 0 or null, got 0",
        ),
        ("mm_projector_lr=1", "mm_projector_lr: unknown key, did you mean optimizer.learning_rates.projector?"),
    ],
)
def test_a_part_that_cannot_train_is_told(options: str, line: str) -> None:
    assert problems(SMALL, *re.split(r" (?=\w+[.=])", options)) == [f"command line: {line}"]


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert problems(SMALL, "model.name_or_path=./x", "model.revision=main") == [
        f"command line: model.revision: the folder {tmp_path}/x has no revisions; remove it"
    ]


def test_a_key_given_twice_names_both_lines() -> None:
    text = "data:\n  sources: [shapes]\n  max_length: 4\n  max_length: 5\nmodel: {name_or_path: x}\nmodel: {}\n"
    assert problems(text) == [
        "run.yaml:4: data.max_length: given twice, first in line 3; keep one of them",
        "run.yaml:6: model: given twice, first in line 5; keep one of them",
    ]


def test_of_a_key_given_twice_the_first_value_is_checked() -> None:
    assert problems(SMALL + "seed: x\nseed: 1\n") == [
        "run.yaml:3: seed: wanted an integer >= 0 and < 4294967296, got 'x'",
        "run.yaml:4: seed: given twice, first in line 3; keep one of them",
    ]


def test_what_an_override_replaced_has_no_line_any_more() -> None:
    text = "model: {name_or_path: x}\ndata:\n  sources:\n  - shapes\n"
    assert problems(text, "data.sources=[3]") == ["command line: data.sources.0: wanted keys below it, got 3"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("epochs", "wanted section.key=value or an option of --help, got 'epochs'"),
        ("=3", "wanted section.key=value or an option of --help, got '=3'"),
        ("--optimizer.lr", "wanted section.key=value or an option of --help, got '--optimizer.lr'"),
        ("data.max_lenght=3", "data.max_lenght: unknown key, did you mean data.max_length?"),
        ("data.sources.2=a/b", "data.sources.2: wanted an index from 0 to 1, 1 to append"),
        ("data.sources.-1=a/b", "data.sources.-1: wanted an index from 0 to 1, 1 to append"),
        ("data.sources.name=a/b", "data.sources.name: wanted an index from 0 to 1, 1 to append"),
        ("data.max_length=[1", "data.max_length: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("checkpoint={keep_last: 1, keep_last: 2}", "checkpoint.keep_last: given twice; keep one of them"),
        ("optimizer.lr.x=3", "optimizer.lr: wanted a number > 0, got a section of keys"),
        ("type=vl_swiftkv", "type: unknown key, did you mean optimizer.type?"),
    ],
)
def test_a_wrong_override_is_told(override: str, line: str) -> None:
    assert problems(SMALL, override) == [f"command line: {line}"]


def test_all_problems_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = "data:\n  max_lenght: 5\n  sources: [{name: shapes, path: x}]\nepochs: '3'\nmodel: {dtype: int8}\n"
    assert problems(text, "seed=x", "foo") == [
        "run.yaml:2: data.max_lenght: unknown key, did you mean data.max_length?",
        "run.yaml:3: data.sources.0: wanted exactly one of name and path, got both",
        "run.yaml:4: epochs: wanted an integer > 0, got '3'",
        "run.yaml:5: model.name_or_path: missing. The teacher: a local folder, a hub id, or the name of a preset such "
        "as small-llava-next.",
        "run.yaml:5: model.dtype: wanted one of float32, bfloat16, auto, got 'int8'",
        "command line: wanted section.key=value or an option of --help, got 'foo'",
        "command line: seed: wanted an integer >= 0 and < 4294967296, got 'x'",
    ]


# --- Texts that become file names and stand on a terminal -------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        *((name, "control characters") for name in (r"a\nb", r"a\e[31m", r"a\0", r"a\x7f", r"\x9b2J", r"a\u2028b")),
        *((name, "the name of one folder") for name in (" a", "a ", ".", "..", "a/b", "a/", r"a\_")),
        *((name, "half of a character") for name in (r"\ud83d", r"\ude00", r"\ude00\ud83d", r"a\ud83d b")),
    ],
)
def test_a_name_that_is_no_folder_or_would_steer_the_terminal_is_one_line(value: str, wrong: str) -> None:
    for lines in (
        problems(SMALL, f'output.name="{value}"'),
        problems(SMALL + f'output: {{name: "{value}"}}\n'),
    ):
        assert len(lines) == 1 and wrong in lines[0] and lines[0].isprintable()


def test_no_name_of_a_config_may_hold_control_characters() -> None:
    """Whatever key it stands at, and the keys too; paths may, but for NUL."""
    keys = ["model.name_or_path", "model.revision", "data.sources.0.name", "data.sources.0.split"]
    keys += ["cluster.address", "cluster.network_interface", "checkpoint.allow_changed.0"]
    for key in keys:
        (line,) = problems(SMALL + "checkpoint: {allow_changed: []}\n", rf'{key}="x\e[2J"')
        assert line == rf"command line: {key}: wanted text without control characters, got 'x\x1b[2J'"
    (line,) = problems(SMALL, r'output.dir="x\0"')
    assert line == r"command line: output.dir: wanted a path, got 'x\x00', which holds a NUL character"
    for text in (
        r'"a\e[2J": 3',
        r'output: {"a\nb": 3}',
        r'tune: {space: {"a\e": [3]}}',
        r'epochs: ["\x7f"]',
        r'"\ud83d": 3',
        r'data: {x: "\ud83d"}',
    ):
        assert all(line.isprintable() for line in problems(text))
    for override in ("a\x1bb=3", "a\udcffb=3", "output.name=\udcff", "output.name=\x1b"):
        (line,) = problems(SMALL, override)
        assert line.startswith("command line: ") and line.isprintable()
    Path("a\nb.yaml").write_text(SMALL)
    with pytest.raises(ConfigError) as caught:
        load_config("a\nb.yaml")
    assert caught.value.problems == (r"a\nb.yaml: output.name: wanted text without control characters, got 'a\nb'",)


def test_a_character_may_be_written_as_json_does() -> None:
    name = "\U0001f600 \U0001d11e"
    assert load(SMALL, f"output.name={json.dumps(name)}").output.name == name
    assert load(SMALL + f"output: {{name: {json.dumps(name)}}}\n").output.name == name
    assert load(SMALL + f"output: {{name: {name}}}\n").output.name == name


def test_each_problem_is_told_once() -> None:
    (line,) = problems(SMALL, "optimizer.betas=[]")
    assert line == "command line: optimizer.betas: wanted a list of 2 values, got []"
    values = ("null", "[]", "[[]]", "{}", "x", "-1", "[null, null]", "[x, y, z]", "[0.9]", "{a: {b: 1}}")
    sections = [name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields")]
    for section in sections:
        for name in Config.model_fields[section].annotation.model_fields:  # type: ignore[union-attr]
            for value in values:
                Path("run.yaml").write_text(SMALL)
                try:
                    load_config("run.yaml", [f"{section}.{name}={value}"])
                except ConfigError as error:
                    assert len(set(error.problems)) == len(error.problems), (section, name, value)


# --- The original project's layout ------------------------------------------------------------------------------------


def test_a_file_of_the_original_project_means_what_it_meant(tmp_path: Path) -> None:
    config = load_config(ORIGINAL, ["checkpoint.every_steps=5"])
    assert (config.model.name_or_path, config.model.num_key_value_layers) == ("small-llava-next", 2)
    assert (config.epochs, config.gradient_accumulation_steps, config.optimizer.lr) == (3, 4, 1e-4)
    assert (config.output.dir, config.output.level) == (str(tmp_path / "runs"), "info")
    assert config.checkpoint.every_steps == 5


PRESET = "projects.swiftkv.models.llava_next.create_small_llava_next_swiftkv_config"
NO_FINAL = "see checkpoint.every_steps; the final checkpoint is always written"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("type: vl_swiftkv", ["type: no effect here: there is one trainer"]),
        ("code: ../train.py", ["code: no effect here: a config names no code to run"]),
        ("deepspeed: {zero_optimization: {stage: 0}}", ["deepspeed: ZeRO stage 0 has no effect here"]),
        (
            "deepspeed: {train_micro_batch_size_per_gpu: 1, gradient_clipping: 1.0, x: 1}",
            [
                "deepspeed: ZeRO stage 0 has no effect here",
                "deepspeed.train_micro_batch_size_per_gpu: no effect here: micro_batch_size says the same",
                "deepspeed.gradient_clipping: no effect here: see optimizer.max_grad_norm",
                "deepspeed.x: no effect here",
            ],
        ),
        (
            "logger: {level: WARNING, output_dir: logs, file_output_ranks: [0]}",
            [
                "logger.level: read as output.level",
                "logger.output_dir: read as output.dir",
                "logger.file_output_ranks: no effect here: the command prints, and writes into the run folder",
            ],
        ),
        (
            "checkpoint: [{type: huggingface, save_every_n_steps: 4, output_dir: logs, auto_resume: true}]",
            [
                "checkpoint.0.type: no effect here: there is one checkpoint format, and the final student is a "
                "Hugging Face folder",
                "checkpoint.0.save_every_n_steps: read as checkpoint.every_steps",
                "checkpoint.0.output_dir: read as output.dir",
                "checkpoint.0.auto_resume: no effect here: see the command's --resume",
            ],
        ),
        (
            "checkpoint: [{save_every_n_steps: 0, save_every_n_epochs: 1, save_end_of_training: true}]",
            [
                f"checkpoint.0.save_every_n_steps: no effect here: {NO_FINAL}",
                f"checkpoint.0.save_every_n_epochs: no effect here: {NO_FINAL}",
                "checkpoint.0.save_end_of_training: no effect here: the final checkpoint is always written",
            ],
        ),
        ("tokenizer: {type: huggingface}", ["tokenizer: no effect here: the model's own processor is used"]),
        (
            "tokenizer: {name_or_path: small-llava-next}",
            ["tokenizer: no effect here: the model's own processor is used"],
        ),
    ],
)
def test_an_original_key_gets_one_line(text: str, lines: list[str]) -> None:
    assert notices(SMALL + text) == [f"run.yaml:3: {line}" for line in lines]


def test_original_keys_inside_our_sections_get_one_line() -> None:
    text = (
        f"model: {{type: vl_swiftkv, name_or_path: {PRESET}}}\n"
        "data: {type: vl_sft, sources: [a/b], mask_inputs: true, filter_samples: true, pack_samples: false,\n"
        "       pad_to: div_length, div_length: 64}\n"
    )
    assert notices(text) == [
        "run.yaml:1: model.type: no effect here: any LLaVA-style model is brought into SwiftKV form",
        "run.yaml:1: model.name_or_path: read as the preset small-llava-next",
        "run.yaml:2: data.type: no effect here: samples with and without images are always read alike",
        "run.yaml:2: data.mask_inputs: no effect here: only the answers are supervised",
        "run.yaml:2: data.filter_samples: no effect here: samples longer than data.max_length are left out and counted",
        "run.yaml:2: data.pack_samples: no effect here: packing samples is not available yet",
        "run.yaml:3: data.pad_to: no effect here: padding goes to the longest sample of the micro-batch",
        "run.yaml:3: data.div_length: no effect here: padding goes to the longest sample of the micro-batch",
    ]


def test_renamed_keys_give_way_to_ours_and_are_checked_where_they_stood() -> None:
    text = (
        SMALL + "output: {dir: mine}\nlogger: {output_dir: logs, level: LOUD}\ncheckpoint: [{save_every_n_steps: x}]\n"
    )
    assert problems(text) == [
        "run.yaml:4: output.level: wanted one of debug, info, warning, error, got 'loud'",
        "run.yaml:5: checkpoint.every_steps: wanted an integer > 0 or null, got 'x'",
    ]
    text = SMALL + "output: {dir: mine}\nlogger: {output_dir: logs}\n"
    assert notices(text) == ["run.yaml:4: logger.output_dir: no effect here: output.dir is given as well"]
    assert load(text).output.dir.endswith("/mine")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("type: sft", "type: wanted \"vl_swiftkv\", got 'sft': there is one trainer"),
        (
            "deepspeed: {zero_optimization: {stage: 2}}",
            "deepspeed.zero_optimization.stage: wanted 0, got 2: frozen weights are never sharded, and trained ones "
            "are few; for more speed raise cluster.num_workers",
        ),
        (
            "deepspeed: {gradient_accumulation_steps: 4}",
            "deepspeed.gradient_accumulation_steps: got 4, but gradient_accumulation_steps is 1; set "
            "gradient_accumulation_steps and remove this",
        ),
        ("deepspeed: 3", "deepspeed: wanted keys below it, got 3"),
        ("checkpoint: [3]", "checkpoint.0: wanted keys below it, got 3"),
        (
            "checkpoint: [{type: deepspeed}]",
            "checkpoint.0.type: wanted huggingface, got 'deepspeed': there is one checkpoint format, and the final "
            "student is a Hugging Face folder",
        ),
        (
            "checkpoint: [{every: 3}]",
            "checkpoint.0.every: unknown key; an engine has output_dir, type, save_every_n_steps, save_every_n_epochs, "
            "save_end_of_training, auto_resume",
        ),
        (
            "tokenizer: {name_or_path: microsoft/DialoGPT-small}",
            "tokenizer.name_or_path: got 'microsoft/DialoGPT-small': a tokenizer that is not the model's own has other "
            "ids and no image token; remove it",
        ),
    ],
)
def test_an_original_key_that_would_mislead_is_an_error(text: str, line: str) -> None:
    assert problems(SMALL + text) == [f"run.yaml:3: {line}"]


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("mask_inputs", "wanted true, got false: only the answers are supervised"),
        ("filter_samples", "wanted true, got false: samples longer than data.max_length are left out and counted"),
    ],
)
def test_what_is_always_done_can_not_be_turned_off(key: str, line: str) -> None:
    text = f"model: {{name_or_path: x}}\ndata:\n  sources: [shapes]\n  {key}: false\n  pack_samples: true\n"
    assert problems(text) == [
        f"run.yaml:4: data.{key}: {line}",
        "run.yaml:5: data.pack_samples: wanted false, got true: packing samples is not available yet",
    ]
