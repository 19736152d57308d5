"""Every option of a run: typed, strict and documented; read from one YAML file and from overrides on the command line.

Reading goes one way: YAML text -> `_Draft` (plain values, and the line each came from) -> keys of the original layout
renamed -> overrides -> `Config` (frozen). Every problem found on the way is one line, `file:line: key: what is wrong`,
and all of them are reported together. As in YAML 1.2, `1e-4` is a number and only true and false are booleans.
"""

import difflib
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("data", "sources", 0, "path")."""


class ConfigError(ValueError):
    """A run's configuration is wrong. `problems` holds one line for each thing to mend; `str()` is those lines."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


# --- The options ------------------------------------------------------------------------------------------------------


def _absolute(path: str) -> str:
    """Paths mean the same in every process of a cluster: absolute, against the folder the command was started in."""
    if "://" in path:
        raise ValueError(f"wanted a path on this machine, got the URL {path!r}; download it first")
    return os.path.abspath(os.path.expanduser(path))


def _absolute_if_local(name_or_path: str) -> str:
    is_local = name_or_path.startswith((".", "/", "~")) or os.path.isdir(name_or_path)
    return _absolute(name_or_path) if is_local else name_or_path


def _raise_contradictions(problems: dict[str, str]) -> None:
    """Reports what is wrong between fields, by the dotted key that each line is about ("" is the section itself)."""
    if problems:
        text = "; ".join(f"{key}: {problem}".removeprefix(": ") for key, problem in problems.items())
        raise PydanticCustomError("contradiction", "{text}", {"text": text, "problems": problems})


Text = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[Text, AfterValidator(_absolute)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    # strict: `epochs: true` and `epochs: "3"` are mistakes; validate_default: default paths become absolute too.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class ModelConfig(_Section):
    """The teacher, and the SwiftKV form it is brought into."""

    name_or_path: Annotated[Text, AfterValidator(_absolute_if_local)]
    """The teacher: a local folder, a hub id, or the name of a preset such as small-llava-next."""

    revision: Text | None = None
    """Branch, tag or commit of a hub id. None: the hub's default branch."""

    num_key_value_layers: PositiveInt | None = None
    """N: layers that keep their own keys and values; those above share one trunk. None: what the checkpoint says, else
    half of the text layers, the split that SwiftKV (arXiv 2410.03960) recommends."""

    key_value_group_size: PositiveInt | None = None
    """Layers above N that share one key/value cache. None: what the checkpoint says, else 1, which loses the least."""

    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel; sdpa is the faster one, eager the one to read and debug."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; trained ones stay float32. bfloat16 halves memory; slow on CPUs without AMX."""

    logits_memory_mib: PositiveInt = 256
    """Budget in MiB for the float32 logits of one chunk of the loss; lower it to trade a little time for memory."""

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def _runs_on_a_cpu(cls, value: Any) -> Any:
        if value == "flash_attention_2":
            raise ValueError("flash_attention_2 needs a GPU; use sdpa")
        return value


class SourceConfig(_Section):
    """One data set of the mixture. A bare text stands for its `path` or `name`."""

    name: Text | None = None
    """The built-in world `shapes`, or a hub dataset id. Exactly one of `name` and `path` is given."""

    path: LocalPath | None = None
    """A file, or a pattern of files such as data/*.parquet."""

    image_root: LocalPath | None = None
    """The folder that image paths in the rows are relative to, and may not leave. None: the folder of the file."""

    format: Literal["auto", "jsonl", "json", "parquet"] = "auto"
    """Format of the files; auto goes by their ending."""

    weight: PositiveFloat = 1.0
    """How many times each row is seen per epoch; 0.5 takes half of the rows."""

    split: Text = "train"
    """Split of a named data set."""

    revision: Text | None = None
    """Branch, tag or commit of a hub dataset. None: the hub's default branch."""

    num_samples: PositiveInt | None = None
    """Use only the first so many rows; for the built-in world, how many to draw. None: all."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return _source_from_text(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        problems = {}
        if (self.name is None) == (self.path is None):
            problems[""] = f"wanted exactly one of name and path, got {'neither' if self.name is None else 'both'}"
        elif self.path is not None and self.split != "train":
            problems["split"] = "files have no splits; give the files of this split as path"
        if self.name is None or self.name == "shapes":
            problems |= {"revision": "only a hub dataset has revisions; remove it"} if self.revision else {}
        if self.path is None:
            problems |= {"image_root": "only files have an image_root; remove it"} if self.image_root else {}
            problems |= {"format": "only files have a format; remove it"} if self.format != "auto" else {}
        _raise_contradictions(problems)
        return self


class DataConfig(_Section):
    """What the model reads, and how it is prepared."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1), Strict(False)]
    """The mixture, at least one source: samples with images and text-only ones may be mixed."""

    max_length: PositiveInt = 2048
    """Tokens of a sample, image tokens included; a longer one is left out and counted, never cut through an image."""

    max_images_per_sample: NonNegativeInt = 8
    """Images of a sample; one with more is left out and counted. 0: text only."""

    image_processing_batch_size: PositiveInt = 4
    """Images that one data task holds decoded and preprocessed at once: bounds its memory, changes no result."""

    num_proc: PositiveInt | None = None
    """Data tasks that run at once. None: what the cluster has left beside the workers."""

    cpus_per_task: PositiveFloat | None = None
    """Logical CPUs that a data task reserves. None: 1, or less where that would leave no room for a single task."""

    cache_dir: LocalPath | None = None
    """Folder for downloaded and indexed data. None: the Hugging Face cache."""

    group_by_length: bool = True
    """Put samples of similar length into the same micro-batch, so that less is spent on padding."""

    max_rejected_fraction: Fraction = 0.1
    """Stop the run when more than this fraction of the rows is left out: the data are then not what they seem."""


class OptimizerConfig(_Section):
    """How the SwiftKV weights are updated."""

    type: Literal["adamw"] = "adamw"
    """torch's fused AdamW, the fastest one on CPUs."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate; the default is that of the published SwiftKV recipes."""

    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square, each in [0, 1)."""

    eps: PositiveFloat = 1e-8
    """Added to the denominator of an update, against division by zero."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay per unit of learning rate. 0: the trained weights start as copies of the teacher's."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the global gradient norm to this. None: never clip."""


class SchedulerConfig(_Section):
    """The learning rate over the run."""

    type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """A schedule of transformers.get_scheduler."""

    warmup_ratio: Fraction = 0.05
    """Fraction of the run's steps over which the learning rate rises from 0."""

    warmup_steps: NonNegativeInt | None = None
    """The same as a number of steps; wins over the ratio. None: use the ratio."""


class ClusterConfig(_Section):
    """Where the run computes."""

    address: Text | None = None
    """A Ray cluster's address. None: join the one that RAY_ADDRESS or the job names, else start one on this machine.
    "local": always start one."""

    num_workers: NonNegativeInt = 1
    """Training processes, each with a full copy of the model. 0: everything in this process, without Ray."""

    threads_per_worker: PositiveInt | None = None
    """Compute threads of a worker. None: the CPUs it reserves. Other numbers of threads give other last bits."""

    cpus_per_worker: PositiveFloat | None = None
    """Logical CPUs that Ray reserves for a worker. None: an equal share of the machine, with room for data tasks."""

    timeout_seconds: PositiveFloat = 300.0
    """How long a worker may wait for the others before the run fails instead of hanging."""

    max_failures: NonNegativeInt = 3
    """Times that lost workers are replaced and the run goes on from its newest checkpoint."""

    network_interface: Text | None = None
    """Network interface for the workers' traffic (GLOO_SOCKET_IFNAME), such as eth0. None: let gloo choose."""


class CheckpointConfig(_Section):
    """What is kept to resume from."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints. None: every tenth of the run. The final one is always written."""

    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; two, so that a damaged one does not lose the run."""


class OutputConfig(_Section):
    """The run folder `dir`/`name`, and what is told on the way."""

    dir: LocalPath = "runs"
    """Folder of all runs."""

    name: Text | None = None
    """This run's folder below `dir`. None: the name of the config file without its ending."""

    log_every_steps: PositiveInt = 1
    """Optimizer steps between two lines of metrics."""

    order: bool = False
    """Write order.jsonl: the sample ids of every step."""

    tensorboard: bool = True
    """Write the metrics for TensorBoard as well."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages that are printed."""

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or Path(name).name != name):
            raise ValueError(f"wanted the name of one folder, got {name!r}; where it lies is output.dir")
        return name


class Config(_Section):
    """One run, complete."""

    objective: Literal["distill"] = "distill"
    """What is learnt: the student follows the teacher's distribution over next tokens."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the data and of new weights, below 2**32."""

    epochs: PositiveInt = 1
    """Passes over the mixture."""

    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps. None: only `epochs` counts."""

    micro_batch_size: PositiveInt = 1
    """Samples of one forward pass of one worker."""

    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches that a worker sums up for one optimizer step."""

    temperature: PositiveFloat = 2.0
    """Softens both distributions; the loss is multiplied by its square, which keeps the size of the gradient."""

    vision_loss_weight: NonNegativeFloat = 1.0
    """Weight of a sample that has images."""

    text_loss_weight: NonNegativeFloat = 1.0
    """Weight of a sample without images. Not both weights may be 0."""

    hidden_loss_weight: NonNegativeFloat = 0.0
    """Weight of the distance between final hidden states of student and teacher. 0: the term is not computed."""

    model: ModelConfig
    """The teacher and its SwiftKV form."""

    data: DataConfig
    """What the model reads."""

    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """How weights are updated."""

    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """The learning rate over the run."""

    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Where the run computes."""

    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """What is kept to resume from."""

    output: OutputConfig = Field(default_factory=OutputConfig)
    """The run folder."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = {}
        if self.vision_loss_weight == 0 and self.text_loss_weight == 0:
            problems["text_loss_weight"] = "0 like vision_loss_weight: nothing would be learnt; raise one of them"
        if self.model.revision and os.path.isabs(self.model.name_or_path):
            problems["model.revision"] = f"the folder {self.model.name_or_path} has no revisions; remove it"
        _raise_contradictions(problems)
        return self

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step, over all workers."""
        return self.micro_batch_size * self.gradient_accumulation_steps * max(self.cluster.num_workers, 1)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, _Section)


def _source_from_text(text: str) -> dict[str, str]:
    is_path = text.endswith((".jsonl", ".json", ".parquet")) or "*" in text or os.path.exists(os.path.expanduser(text))
    return {"path": text} if is_path and text != "shapes" else {"name": text}


# --- Load, dump, compare ----------------------------------------------------------------------------------------------


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration; see `load_config_and_notices`, whose notices it drops."""
    return load_config_and_notices(file, overrides)[0]


def load_config_and_notices(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, tuple[str, ...]]:
    """Reads a run's configuration, and tells which keys were understood but mean something else or nothing here.

    Args:
        file: a YAML file in this project's layout or in that of the original project.
        overrides: `section.key=value`, a leading `--` allowed; values are YAML. The last of several wins.

    Returns:
        The configuration, paths absolute and the run named, and one line for each such key.

    Raises:
        ConfigError: holds one line for each problem of the file and of the overrides.
    """
    draft = _Draft(str(file))
    draft.read_file()
    _rename_original_keys(draft)
    for override in overrides:
        draft.override(override)
    _rename_original_preset(draft)

    for name in (name for name, option in Config.model_fields.items() if _is_section(option.annotation)):
        if draft.tree.get(name) is None:  # `optimizer:` with nothing below it is an empty section
            draft.tree[name] = {}
    output = draft.tree["output"]
    if isinstance(output, dict) and output.get("name") is None:
        output["name"] = Path(file).stem  # stored: a copy of this configuration under another file name is the same run

    try:
        config = Config.model_validate(draft.tree)
    except ValidationError as error:
        for details in error.errors():
            for key, text in _in_plain_words(details):
                draft.problem(key, text)
    if draft.problems:
        raise ConfigError([line for _, line in sorted(draft.problems, key=lambda problem: problem[0])])
    return config, tuple(line for _, line in sorted(draft.notices, key=lambda notice: notice[0]))


def dump_config(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back to an equal one."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


# Where a run computes, what it keeps and how its data are prepared may change between a run and its resumption.
_DECIDES_NO_NUMBER = (
    "output",
    "checkpoint",
    "cluster",
    "data.image_processing_batch_size",
    "data.num_proc",
    "data.cpus_per_task",
    "data.cache_dir",
    "data.max_rejected_fraction",
)


def changed_keys(a: Config, b: Config) -> list[str]:
    """The keys, such as `optimizer.lr`, in which two configurations would give different numbers."""
    return list(_changes(a.model_dump(mode="json"), b.model_dump(mode="json"), ()))


def _changes(a: Any, b: Any, key: KeyPath) -> Iterator[str]:
    if _dotted(key) in _DECIDES_NO_NUMBER:
        return
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        for part in {**a, **b}:
            yield from _changes(a.get(part), b.get(part), (*key, part))
    elif a != b:
        yield _dotted(key)


# --- YAML -------------------------------------------------------------------------------------------------------------

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_NO_ALIASES = "anchors (&) and aliases (*) are not read; write the value out, or put text that begins so in quotes"
_COMMAND_LINE = float("inf")  # as a line number: behind every line of the file
_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for word, value in {"null": None, "true": True, "false": False}.items()
    for spelling in (word, word.title(), word.upper())
}
_INT = re.compile(r"[-+]?[0-9]{1,100}")  # longer ones are read as floats: int() refuses to parse very long texts
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Composes nodes, which know their lines; refuses what a file of options never needs and an attack might use."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if event.anchor:
            problem = _NO_ALIASES
        elif event.tag:
            problem = f"the tag {event.tag} is not read; remove it"
        elif self.depth == _MAX_DEPTH:
            problem = f"nested deeper than {_MAX_DEPTH} levels"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as "1e-4", which PyYAML takes for text and we for a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
    if node.style is not None:  # quoted
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.match(text) else text


@dataclass
class _Draft:
    """Plain values on their way to a `Config`: where each came from, and what was found to say about it."""

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, float] = field(default_factory=dict)
    problems: list[tuple[float, str]] = field(default_factory=list)
    notices: list[tuple[float, str]] = field(default_factory=list)

    def problem(self, key: KeyPath, text: str) -> None:
        self.problems.append(self._located(key, text))

    def notice(self, key: KeyPath, text: str) -> None:
        self.notices.append(self._located(key, text))

    def _located(self, key: KeyPath, text: str) -> tuple[float, str]:
        known = (self.lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.lines)
        line = next(known, 0.0)
        where = "command line" if line == _COMMAND_LINE else f"{self.file}:{line:.0f}" if line else self.file
        return line, f"{where}: {_dotted(key)}: {text}"

    def read_file(self) -> None:
        """Fills the tree. A file that holds no keys raises ConfigError at once: nothing else can be said about it."""
        try:
            with open(self.file, "rb") as stream:
                content = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError([f"{self.file}: can not be read: {error.strerror}"]) from None
        if len(content) > _MAX_BYTES:
            raise ConfigError([f"{self.file}: larger than {_MAX_BYTES >> 20} MiB; wanted a YAML file of options"])
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ConfigError([f"{self.file}:{line}: not UTF-8 text; save the file as UTF-8"]) from None
        try:
            node = yaml.compose(text, Loader=_Loader)
            tree = None if node is None else self._values(node, ())
        except yaml.YAMLError as error:
            line, problem = _syntax_problem(error, text)
            raise ConfigError([f"{self.file}:{line}: {problem}"]) from None
        if tree is None:
            raise ConfigError([f"{self.file}: is empty; wanted at least model.name_or_path and data.sources"])
        if not isinstance(tree, dict):
            raise ConfigError([f"{self.file}:1: wanted keys such as `model:` at the top, got {_shown(tree)}"])
        self.tree = tree

    def override(self, text: str) -> None:
        """Sets one value as `section.key=value` says."""
        name, equals, value = text.removeprefix("--").partition("=")
        if not (name and equals):
            self.problems.append((_COMMAND_LINE, f"command line: wanted section.key=value, got {text!r}"))
            return
        try:
            node = yaml.compose(value, Loader=_Loader)
            if (place := self._open(name.split("."))) is not None:
                container, key = place
                for known in [known for known in self.lines if known[: len(key)] == key]:
                    del self.lines[known]
                self.lines[key] = _COMMAND_LINE
                container[key[-1]] = None if node is None else self._values(node, key, _COMMAND_LINE)
        except yaml.YAMLError as error:
            self.problems.append((_COMMAND_LINE, f"command line: {name}: {_syntax_problem(error, value)[1]}"))

    def take(self, *key: str) -> Any:
        """Removes and returns what stands at a key; None where there is nothing."""
        section: Any = self.tree
        for part in key[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        return section.pop(key[-1], None) if isinstance(section, dict) else None

    def take_section(self, key: str) -> dict[str, Any]:
        """The same for a section; anything else that stands there is a problem."""
        section = self.take(key)
        if section is not None and not isinstance(section, dict):
            self.problem((key,), f"wanted keys below it, got {_shown(section)}")
        return section if isinstance(section, dict) else {}

    def rename(self, old: KeyPath, new: tuple[str, str], value: Any) -> None:
        """Gives a value that stood at `old` to `new`, unless that is given too."""
        section = self.tree.get(new[0]) or {}
        if isinstance(section, dict) and new[1] in section:
            self.notice(old, f"no effect here: {_dotted(new)} is given as well")
        else:
            self.notice(old, f"read as {_dotted(new)}")
            self.lines[new] = self.lines.get(old, 0.0)
            self.tree[new[0]] = section | {new[1]: value} if isinstance(section, dict) else section

    def _values(self, node: yaml.Node, key: KeyPath, line: float | None = None) -> Any:
        """The plain value of a node; notes the line of everything in it: its own, or `line` for all."""
        self.lines.setdefault(key, line or node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._values(item, (*key, index), line) for index, item in enumerate(node.value)]
        section: dict[str, Any] = {}
        for key_node, item in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            child = (*key, key_node.value)
            if key_node.value in section:
                first, self.lines[child] = self.lines[child], line or key_node.start_mark.line + 1
                where = "" if line else f", first in line {first:.0f}"
                self.problem(child, f"given twice{where}; keep one of them")
                self.lines[child] = first  # whose value stays
            else:
                self.lines[child] = line or key_node.start_mark.line + 1
                section[key_node.value] = self._values(item, child, line)
        return section

    def _open(self, names: Sequence[str]) -> tuple[Any, KeyPath] | None:
        """The section or list that holds a value, made where there was none, and the value's key. None: a bad index."""
        here: Any = self.tree
        key: KeyPath = ()
        for depth, name in enumerate(names):
            part: str | int = name
            if isinstance(here, list):
                if name not in map(str, range(len(here) + 1)):
                    self.lines[(*key, name)] = _COMMAND_LINE
                    self.problem((*key, name), f"wanted an index from 0 to {len(here)}, {len(here)} to append")
                    return None
                part = int(name)
                here.extend([None] * (part == len(here)))
            key = (*key, part)
            if depth + 1 == len(names):
                break
            below = here.get(part) if isinstance(here, dict) else here[part]
            if key[:-1] == ("data", "sources") and isinstance(below, str):
                below = _source_from_text(below)
            if not isinstance(below, dict | list):
                below = [] if names[depth + 1].isdecimal() else {}
                self.lines[key] = _COMMAND_LINE
            here[part] = below
            here = below
        return here, key


def _syntax_problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and plain words of what PyYAML or `_Loader` could not read."""
    if isinstance(error, yaml.reader.ReaderError):
        character = text[error.position]
        return text.count("\n", 0, error.position) + 1, f"the character {character!r} is not allowed in YAML"
    assert isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
    problem = str(error.problem)
    if r"'\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    elif str(error.context) in ("while scanning an alias", "while scanning an anchor"):
        problem = _NO_ALIASES
    elif "cannot start any token" in problem:
        problem = f"not valid YAML: {problem}; put text that begins so in quotes"
    elif error.context or type(error) is not yaml.MarkedYAMLError:
        problem = f"not valid YAML: {problem}"
    return error.problem_mark.line + 1, problem


# --- The original project's layout ------------------------------------------------------------------------------------

_PRESETS = {"create_small_llava_next_swiftkv_config": "small-llava-next"}

# Keys with one possible value here, and why: why it changes nothing, and why another value is an error.
_ONLY: dict[tuple[str, ...], tuple[tuple[Any, ...], str]] = {
    ("type",): (("vl_swiftkv",), "there is one trainer"),
    ("model", "type"): (("vl_swiftkv", "vl_swiftkv_model"), "any LLaVA-style model is brought into SwiftKV form"),
    ("data", "type"): (("vl_sft",), "samples with and without images are always read alike"),
    ("data", "mask_inputs"): ((True,), "only the answers are supervised"),
    ("data", "filter_samples"): ((True,), "samples longer than data.max_length are left out and counted"),
    ("data", "pack_samples"): ((False,), "packing samples is not available yet"),
}
_DEEPSPEED_SIZES = {
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
_ENGINE_NOTICES = {
    "type": "there is one checkpoint format, and the final student is a Hugging Face folder",
    "save_every_n_steps": "see checkpoint.every_steps; the final checkpoint is always written",
    "save_every_n_epochs": "see checkpoint.every_steps; the final checkpoint is always written",
    "save_end_of_training": "the final checkpoint is always written",
    "auto_resume": "see the command's --resume",
}
_PADDING = "no effect here: padding goes to the longest sample of the micro-batch"
_NO_EFFECT: dict[tuple[str, ...], str] = {
    ("code",): "no effect here: a config names no code to run",
    ("data", "pad_to"): _PADDING,
    ("data", "div_length"): _PADDING,
}


def _rename_original_keys(draft: _Draft) -> None:
    """Brings keys of the original project's files into ours: one notice or problem for each, never silence."""
    tokenizer = draft.take_section("tokenizer")
    model = draft.tree.get("model")
    if tokenizer:
        name, own = tokenizer.get("name_or_path"), model.get("name_or_path") if isinstance(model, dict) else None
        if name is None or name == own:
            draft.notice(("tokenizer",), "no effect here: the model's own processor is used")
        else:
            reason = "a tokenizer that is not the model's own has other ids and no image token; remove it"
            draft.problem(("tokenizer", "name_or_path"), f"got {_shown(name)}: {reason}")

    for key, (accepted, reason) in _ONLY.items():
        if (value := draft.take(*key)) in accepted:
            draft.notice(key, f"no effect here: {reason}")
        elif value is not None:
            draft.problem(key, f"wanted {json.dumps(accepted[0])}, got {_shown(value)}: {reason}")
    for key, reason in _NO_EFFECT.items():
        if draft.take(*key) is not None:
            draft.notice(key, reason)

    _rename_original_deepspeed(draft)
    _rename_original_checkpoints(draft)
    for name, value in draft.take_section("logger").items():
        if name == "level":
            draft.rename(("logger", name), ("output", "level"), value.lower() if isinstance(value, str) else value)
        elif name == "output_dir":
            draft.rename(("logger", name), ("output", "dir"), value)
        else:
            draft.notice(("logger", name), "no effect here: the command prints, and writes into the run folder")


def _rename_original_deepspeed(draft: _Draft) -> None:
    block = draft.take_section("deepspeed")
    if not block:
        return
    zero = block.pop("zero_optimization", None)
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage == 0:
        draft.notice(("deepspeed",), "ZeRO stage 0 has no effect here")
    else:
        reason = "frozen weights are never sharded, and trained ones are few; for more speed raise cluster.num_workers"
        draft.problem(("deepspeed", "zero_optimization", "stage"), f"wanted 0, got {_shown(stage)}: {reason}")
    for name, value in block.items():
        key = ("deepspeed", name)
        if (ours := _DEEPSPEED_SIZES.get(name)) is None:
            draft.notice(key, f"no effect here: see {_OURS[name]}" if name in _OURS else "no effect here")
        elif value == (own := draft.tree.get(ours, Config.model_fields[ours].default)):
            draft.notice(key, f"no effect here: {ours} says the same")
        else:
            draft.problem(key, f"got {_shown(value)}, but {ours} is {_shown(own)}; set {ours} and remove this")


def _rename_original_checkpoints(draft: _Draft) -> None:
    if not isinstance(engines := draft.tree.get("checkpoint"), list):
        return
    draft.take("checkpoint")
    for index, engine in enumerate(engines):
        if not isinstance(engine, dict):
            draft.problem(("checkpoint", index), f"wanted keys below it, got {_shown(engine)}")
            continue
        for name, value in engine.items():
            key = ("checkpoint", index, name)
            if name == "output_dir":
                draft.rename(key, ("output", "dir"), value)
            elif name == "save_every_n_steps" and value != 0:  # 0 was off
                draft.rename(key, ("checkpoint", "every_steps"), value)
            elif name not in _ENGINE_NOTICES:
                draft.problem(key, f"unknown key; an engine has output_dir, {', '.join(_ENGINE_NOTICES)}")
            elif name == "type" and value != "huggingface":
                draft.problem(key, f"wanted huggingface, got {_shown(value)}: {_ENGINE_NOTICES[name]}")
            else:
                draft.notice(key, f"no effect here: {_ENGINE_NOTICES[name]}")


def _rename_original_preset(draft: _Draft) -> None:
    model = draft.tree.get("model")
    name = model.get("name_or_path") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(name, str) and (preset := _PRESETS.get(name.rpartition(".")[2])):
        draft.notice(("model", "name_or_path"), f"read as the preset {preset}")
        model["name_or_path"] = preset


# --- Problems in plain words ------------------------------------------------------------------------------------------

# What other trainers (HF Trainer, TRL, Axolotl, LLaMA-Factory, torchtune, Lightning, ArcticTraining) call our keys.
_OTHER_NAMES = {
    "seed": "random_seed data_seed",
    "epochs": "num_train_epochs num_epochs max_epochs",
    "max_steps": "max_train_steps max_steps_per_epoch train_iters exit_iteration num_train_steps",
    "micro_batch_size": "per_device_train_batch_size per_device_batch_size train_batch_size batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation accumulate_grad_batches",
    "temperature": "kd_temperature distill_temperature",
    "model.name_or_path": "model_name_or_path base_model model_id model_name pretrained_model_name_or_path model_path",
    "model.revision": "model_revision revision_of_model",
    "model.attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2 sdp_attention",
    "model.dtype": "bf16 bfloat16 fp16 torch_dtype precision mixed_precision",
    "data.sources": "dataset datasets dataset_name dataset_path train_file train_files data_files data_path",
    "data.max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_length seq_len model_max_length",
    "data.num_proc": "dataset_num_proc preprocessing_num_workers dataloader_num_workers dataset_processes",
    "data.cache_dir": "use_data_cache cache_processed_data dataset_prepared_path",
    "data.sources.*.image_root": "image_dir image_folder media_dir image_path",
    "data.sources.*.num_samples": "max_samples max_train_samples",
    "optimizer.type": "optim",
    "optimizer.lr": "learning_rate peak_lr",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.max_grad_norm": "gradient_clipping clip_grad_norm gradient_clip_val grad_clip",
    "scheduler.type": "lr_scheduler_type lr_scheduler",
    "scheduler.warmup_steps": "num_warmup_steps",
    "cluster.num_workers": "num_processes nproc_per_node world_size num_nodes",
    "cluster.timeout_seconds": "ddp_timeout",
    "checkpoint.every_steps": "save_steps save_every_n_steps checkpointing_steps save_interval",
    "checkpoint.keep_last": "save_total_limit keep_last_n_checkpoints",
    "output.dir": "output_dir logging_dir default_root_dir",
    "output.name": "run_name experiment_name",
    "output.log_every_steps": "logging_steps log_every_n_steps loss_log_interval log_interval",
    "output.level": "log_level logging_level",
    "output.tensorboard": "report_to",
}
_OURS: dict[str, str] = {theirs: ours for ours, names in _OTHER_NAMES.items() for theirs in names.split()}


def _dotted(key: KeyPath) -> str:
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in key)


def _shown(value: Any) -> str:
    """A value as the user wrote it, on one line."""
    if isinstance(value, dict):
        return "a section of keys"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _known_keys() -> dict[KeyPath, dict[str, Any]]:
    """The JSON schema of every key; "*" stands for every index of a list."""
    root = Config.model_json_schema()
    known: dict[KeyPath, dict[str, Any]] = {}

    def add(key: KeyPath, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
        known[key] = schema
        for name, child in schema.get("properties", {}).items():
            add((*key, name), child)
        for item in schema.get("prefixItems", [schema["items"]] if "items" in schema else [])[:1]:
            add((*key, "*"), item)

    add((), root)
    return known


def _pattern(key: KeyPath) -> KeyPath:
    return tuple("*" if isinstance(part, int) else part for part in key)


def _in_plain_words(details: ErrorDetails) -> Iterator[tuple[KeyPath, str]]:
    """What a pydantic error means to the user, and the keys it is about."""
    key, kind = details["loc"], details["type"]
    if kind == "contradiction":
        for name, text in details["ctx"]["problems"].items():
            yield (*key, *filter(None, name.split("."))), text
    elif kind == "value_error":
        yield key, str(details["ctx"]["error"])
    elif kind == "too_short" and details["input"]:
        return  # pydantic counts only the items that are right, and told about each of the others
    elif kind == "extra_forbidden":
        yield key, _unknown(key)
    elif kind == "missing" and not isinstance(key[-1], int):
        yield key, f"missing. {_known_keys()[_pattern(key)]['description']}"
    else:
        if kind == "missing":  # one of the two betas: the list is what is wrong
            key = key[:-1]
        quotes = "; put it in quotes" if kind == "string_type" and isinstance(details["input"], int | float) else ""
        yield key, f"wanted {_wanted(_known_keys()[_pattern(key)])}, got {_shown(details['input'])}{quotes}"


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _wanted(schema: dict[str, Any]) -> str:
    """What a key's schema allows, in plain words."""
    if "anyOf" in schema:
        return " or ".join(_wanted(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    match schema["type"]:
        case "object":
            return "keys below it"
        case "array":
            count, most = schema.get("minItems", 0), schema.get("maxItems")
            return f"a list of {count} values" if count == most else f"a list of at least {count}"
        case "string":
            return "text"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    bounds = [f"{sign} {schema[name]:.16g}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join(["an integer" if schema["type"] == "integer" else "a number", " and ".join(bounds)]).strip()


def _unknown(key: KeyPath) -> str:
    """Suggests the key that was meant: by another trainer's name for it, else by spelling; or lists what there is."""
    leaf = str(key[-1])[-64:].lower().replace("-", "_")
    pattern = _pattern(key[:-1])
    siblings = [name for name in _known_keys() if name and name[:-1] == pattern]
    in_list = "*" in pattern
    candidates = siblings if in_list else [name for name in _known_keys() if name and "*" not in name]

    def closeness(name: KeyPath) -> float:
        ratio = difflib.SequenceMatcher(None, leaf.rpartition(".")[2], str(name[-1])).ratio()
        return ratio + 0.1 * (name[:-1] == pattern)

    meant: KeyPath = tuple(_OURS.get(leaf, "").split("."))
    if leaf not in _OURS or (in_list and meant[:-1] != pattern):
        meant = max(candidates, key=closeness)
        if closeness(meant) < 0.75:
            return f"unknown key; the keys here are {', '.join(str(name[-1]) for name in siblings)}"
    suggestion = _dotted((*key[:-1], meant[-1]) if in_list else meant).replace("*", "0")
    if suggestion == _dotted(key):
        section, _, name = suggestion.rpartition(".")
        return f"unknown key; in a file write `{name}:` indented below `{section}:`"
    return f"unknown key, did you mean {suggestion}?"
