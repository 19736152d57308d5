"""Every option of a run: typed, strict and documented."""

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, Self

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
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def _without_control_characters(text: str) -> str:
    """Names become folders and words on a terminal, which an escape sequence or the end of a line would steer."""
    if any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text):
        raise ValueError(f"wanted text without control characters, got {text!r}")
    return text


def _absolute(path: str) -> str:
    """Paths mean the same in every process of a cluster: absolute, against the folder the command was started in."""
    if "\0" in path:
        raise ValueError(f"wanted a path, got {path!r}, which holds a NUL character")
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


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_control_characters)]
Size = Annotated[int, Field(gt=0, le=1_000_000)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
"""Of a folder that somebody else may have named, so with whatever characters."""
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

PLAIN_PARTS = ("vision_tower", "projector", "text")
PARTS = (*PLAIN_PARTS, "swiftkv")
"""Of a model, each weight of which belongs to one of them; the last only of a student."""
Trainable = Literal["vision_tower", "projector", "text", "swiftkv", "all"]


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

    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] | None = None
    """With objective=sft: text layers. A preset is drawn with so many; a checkpoint of fewer is given further ones on
    top, which change nothing until they have learnt to. None: as many as there are."""

    num_key_value_layers: PositiveInt | None = None
    """N: layers that keep their own keys and values; those above share one trunk. None: what the checkpoint says, else
    half of the text layers, the split that SwiftKV (arXiv 2410.03960) recommends."""

    key_value_group_size: PositiveInt | None = None
    """Layers above N that share one key/value cache. None: what the checkpoint says, else 1, which loses the least."""

    start: Literal["fit", "copy"] | None = None
    """How a student's keys and values start. copy: as the teacher's, which were made for other inputs. fit: as near to
    the teacher's as a linear map comes, by one pass over some samples and a solve of seconds; see docs/fit.md. None:
    fit, but where the model is a student already or the run goes on from a checkpoint."""

    fit_tokens: PositiveInt | None = None
    """About how many tokens that pass sees. None: 64 for each number of a hidden state, and 100,000 at least."""

    trainable: Annotated[tuple[Trainable, ...], Strict(False)] = ()
    """Parts that train; the others are frozen, and no gradient of them is computed. projector: with all between tower
    and text model; text: with embeddings and head; swiftkv: of a student, with objective=sft by itself alone. None
    given: swiftkv with objective=distill, which trains nothing else, and all with objective=sft."""

    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    """Attention kernel; sdpa is the faster one, with torch's own flash attention on GPUs where that fits, eager the one
    to read and debug."""

    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the frozen weights, and of all of them in final/; trained ones stay float32 until then. bfloat16 halves
    memory; slow on CPUs without units for it. auto: bfloat16 where the hidden size is 512 at least and its matrix
    products are 1.5 times as fast as those of float32 at least, which is taken for granted of GPUs and measured of CPUs
    when a run starts; else, or where nothing is frozen, float32. Kept when the run goes on."""

    gradient_checkpointing: bool = False
    """Less memory for more time, with the same bits: what a layer that trains makes inside is not kept for its
    gradient but made again. About half of a step's memory with objective=sft; little where answers are short."""

    logits_memory_mib: PositiveInt = 96
    """Budget in MiB for the float32 logits of one chunk of the loss; lower it to trade a little time for memory."""

    teacher_cache: Literal["off", "memory", "disk"] = "off"
    """Keeps what the frozen part of the model makes of each sample: later epochs, and runs of the same teacher and N on
    the same data, then run no vision tower, no layer below N and no teacher; results agree to 1e-6. A sample takes
    tokens x hidden size x 4 bytes (2 with dtype=bfloat16). memory: in each machine's /dev/shm, where
    nobody but this user can read it, until the run ends. disk: in teacher_cache_dir."""

    teacher_cache_dir: LocalPath | None = None
    """Folder of the teacher cache on disk, on storage that all workers share. None: .teacher-cache in output.dir."""

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def _is_of_use(cls, value: Any) -> Any:
        # distillation attends sequence by sequence through torch's own function, whatever is named here; sft trains in
        # float32, which the package flash-attn does not take; the vision tower alone is not worth a dependency
        if value == "flash_attention_2":
            raise ValueError(
                "flash_attention_2 would do nothing for the text model; use sdpa, which on a GPU takes torch's own "
                "flash attention where that fits"
            )
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
    """Format of the files; auto goes by what they hold."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How many times each row is seen per epoch; 0.5 takes half of the rows."""

    split: Text = "train"
    """Split of a named data set."""

    revision: Text | None = None
    """Branch, tag or commit of a hub dataset. None: the hub's default branch."""

    num_samples: Annotated[int, Field(gt=0, le=10**9)] | None = None
    """Use only the first so many rows; for the built-in world, how many to draw. None: all."""

    ignore_columns: Annotated[tuple[Text, ...], Strict(False)] = ()
    """Columns that look like pictures but are none that the model should see; otherwise such columns, beside images and
    image, are an error. A key of the turns is written messages.key."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return source_from_text(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        problems = {}
        if (self.name is None) == (self.path is None):
            problems[""] = f"wanted exactly one of name and path, got {'neither' if self.name is None else 'both'}"
        elif self.path is not None and self.split != "train":
            problems["split"] = "files have no splits; give the files of this split as path"
        if self.name == "shapes" and self.ignore_columns:
            problems["ignore_columns"] = "the built-in world has no columns; remove it"
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

    max_length: PositiveInt | None = None
    """Tokens of a sample, image tokens included; a longer one is left out and counted, never cut. None: as many as the
    model has positions for."""

    max_images_per_sample: NonNegativeInt = 8
    """Images of a sample; one with more is left out and counted. 0: text only."""

    image_processing_batch_size: PositiveInt = 4
    """Images that one data task holds decoded and preprocessed at once: bounds its memory, changes no result."""

    num_proc: PositiveInt | None = None
    """Data tasks that run at once. None: what the cluster has left beside the workers."""

    cpus_per_task: PositiveFloat | None = None
    """Logical CPUs that a data task reserves. None: 1, or 0.5 where fewer than two are left beside the workers."""

    cache_dir: LocalPath | None = None
    """Folder for Parquet and hub data as memory-mapped tables, on storage that all machines share. None: the Hugging
    Face cache, which is enough on one machine."""

    max_rejected_fraction: Fraction = 0.1
    """Stop the run when more than this fraction of the rows is left out: the data are then not what they seem."""

    on_refused: Literal["stop", "skip"] = "stop"
    """What a row does to the run that asks for what data may not open, a file outside image_root or a URL. skip: it is
    left out and counted like any other that cannot be used."""


class LearningRatesConfig(_Section):
    """Peak learning rates of parts of the model, all of which follow the one schedule."""

    vision_tower: PositiveFloat | None = None
    """Of the vision tower. None: optimizer.lr, as of each part."""

    projector: PositiveFloat | None = None
    """Of all between tower and text model."""

    text: PositiveFloat | None = None
    """Of the text model with its embeddings and its head."""

    swiftkv: PositiveFloat | None = None
    """Of a student's SwiftKV weights."""


class OptimizerConfig(_Section):
    """How the weights that train are updated."""

    type: Literal["adamw"] = "adamw"
    """torch's fused AdamW, the fastest one on CPUs."""

    lr: PositiveFloat = 2e-4
    """Peak learning rate; the default is that of the published SwiftKV recipes."""

    learning_rates: LearningRatesConfig = Field(default_factory=LearningRatesConfig)
    """Peak learning rates of single parts, such as {vision_tower: 1e-3, projector: 2e-3}."""

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

    num_workers: int | Annotated[tuple[int, int], Strict(False)] = 1
    """Training processes, each with a full copy of the model. 0: everything in this process, without Ray.
    [fewest, most]: as many as the cluster has room for, fewer while a machine is lost, more when it is back."""

    use_gpu: bool = False
    """Each worker computes on a GPU of its own. Bits then differ from run to run: what is said of bits is of CPUs."""

    threads_per_worker: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Compute threads of a worker. None: the cluster's CPUs divided by the workers, 1 with use_gpu. The number decides
    the last bits of every result, so the resolved one is kept with the run."""

    cpus_per_worker: PositiveFloat | None = None
    """Logical CPUs that Ray reserves for a worker. None: the workers share half of the cluster, or with use_gpu take 1
    each at most, and data gets the rest."""

    wait_seconds: PositiveFloat = 600.0
    """Of waiting for what the workers and a data task need of the cluster, while other jobs hold it or a machine is
    lost: the run says so every minute, and after so long ends with exit status 1."""

    stall_seconds: PositiveFloat = 120.0
    """A worker that gets on with nothing for so long, and for ten times as long as its slowest micro-batch took, ends;
    the stacks of the workers are kept in `stacks` of the run folder."""

    max_failures: NonNegativeInt = 3
    """Times that lost or stalled workers are replaced and the run goes on from its newest checkpoint."""

    bit_identical: bool = False
    """Add up gradients micro-batch by micro-batch in the order of the plan: then every number of workers gives the very
    same bits. Costs as many broadcasts a step as it has micro-batches."""

    network_interface: Text | None = None
    """Network interface for the workers' traffic (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME), such as eth0. None: on
    each node what its environment says, else the one that carries the node's address in Ray."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_count_or_a_range(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [1, value]
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if whole and (1 <= numbers[0] <= numbers[1] or value == 0):
            return value
        raise ValueError(f"wanted an integer >= 0 or a list [fewest, most], got {value!r}")

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class CheckpointConfig(_Section):
    """What is kept to resume from."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints. None: every tenth of the run. The final one is always written."""

    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; two, so that a damaged one does not lose the run."""

    keep_best: NonNegativeInt = 0
    """Best checkpoints to keep beside them, by what evaluation.every_steps measured: least KL, or with objective=sft
    highest accuracy. One is then written at each measurement too."""

    allow_changed: Annotated[tuple[Text, ...], Strict(False)] = ()
    """What may have changed since the checkpoint that a run goes on from: model, data, versions, threads, device, or
    keys such as optimizer.lr. The run then gives other numbers than one left alone."""


class EvaluationConfig(_Section):
    """What the student is measured on against its teacher, at the end of a run and on the way."""

    sources: Annotated[tuple[SourceConfig, ...], Strict(False)] = ()
    """Held-out samples, of the same forms as data.sources. None given: answers are not measured, what the student saves
    still is."""

    num_samples: PositiveInt | None = 500
    """Use the first so many samples of the mixture. None: all."""

    batch_size: PositiveInt = 32
    """Samples of one forward pass; bounds the memory, changes no answer."""

    max_new_tokens: PositiveInt = 64
    """Tokens after which a greedy answer is cut off."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between measurements of the student on the way. None: only at the end."""


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
    """What is printed. info: a block at the start, then progress; debug: also what Ray and the workers print; warning
    and error: nothing while all goes well."""

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        if name is not None and (name in (".", "..") or Path(name).name != name or name.strip() != name):
            raise ValueError(f"wanted the name of one folder, got {name!r}; where it lies is output.dir")
        return name


DISTRIBUTIONS = ("grid", "choice", "uniform", "loguniform")
"""How values of an option are drawn, as Ray Tune names it; a bare list is a grid."""


class Space(dict[str, dict[str, list[Any]]]):
    """Options and what they are drawn from. Nobody changes it, and it hashes, as all of a config does."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


class TuneConfig(_Section):
    """A sweep over options, for `python -m vlskv_ray.tune`. A run by itself does not look at it."""

    space: Annotated[dict[str, Any], AfterValidator(Space)] = {}
    """What is tried, by option: a list or {grid: [...]}, of which every combination is a trial; {choice: [...]},
    {uniform: [least, most]} or {loguniform: [least, most]}, which are drawn for each trial."""

    draws: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Times that every combination of the grids is tried, with new draws of all else. With search=optuna: trials."""

    search: Literal["random", "optuna"] = "random"
    """optuna: draws depend on what came before, by the library of that name (`pip install optuna`)."""

    scheduler: Literal["fifo", "asha"] = "fifo"
    """asha: trials that fall behind at a measurement (evaluation.every_steps) are stopped early."""

    metric: Literal["kl", "accuracy"] = "kl"
    """What asha and optuna go by: the KL divergence from the teacher on held-out samples, or accuracy there."""

    max_concurrent_trials: PositiveInt | None = None
    """Trials at a time. None: as many as the cluster has CPUs and GPUs for: one CPU a worker of a trial and one for its
    data, or with cluster.num_workers=0 as many as cluster.threads_per_worker, 1 where that is open."""

    max_accuracy_drop: Fraction = 0.01
    """How much accuracy, of 1, the recommended setting may lose against the teacher."""

    @field_validator("space", mode="before")
    @classmethod
    def _is_a_space(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        space: dict[str, Any] = {}
        for key, drawn in _drawn(value, ""):
            if key in space:
                raise ValueError(f"{key}: given twice; keep one of them")
            space[key] = drawn
        return space


def _drawn(space: dict[str, Any], below: str) -> Iterator[tuple[str, Any]]:
    """Options and what they are drawn from, {distribution: values}; sections may be nested or dotted."""
    for name, wanted in space.items():
        if not name.isprintable():
            raise ValueError(f"{name!r}: wanted the name of an option")
        key = f"{below}{name}"
        if isinstance(wanted, list):
            wanted = {"grid": wanted}
        if not isinstance(wanted, dict) or not wanted:
            raise ValueError(f"{key}: wanted a list of values or one of {', '.join(DISTRIBUTIONS)}, got {wanted!r}")
        if not wanted.keys() & set(DISTRIBUTIONS):
            yield from _drawn(wanted, f"{key}.")
            continue
        [how, values], *more = wanted.items()
        if more:
            raise ValueError(f"{key}: wanted one of {', '.join(DISTRIBUTIONS)}, got {', '.join(wanted)}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}.{how}: wanted a list of values, got {values!r}")
        if how in ("uniform", "loguniform"):
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v) for v in values)
            if len(values) != 2 or not numbers or not values[0] < values[1]:
                raise ValueError(f"{key}.{how}: wanted two numbers [least, most], got {values!r}")
            if how == "loguniform" and values[0] <= 0:
                raise ValueError(f"{key}.{how}: wanted numbers above 0, got {values!r}")
        if key.split(".")[0] in ("output", "cluster", "tune"):
            raise ValueError(f"{key}: cannot be tried; a sweep names its runs and shares out the cluster itself")
        yield key, {how: values}


class Config(_Section):
    """One run, complete."""

    objective: Literal["distill", "sft"] = "distill"
    """What is learnt. distill: the student follows the teacher's distribution over next tokens. sft: a plain model
    follows the answers of the data, with all its weights or those of some parts (model.trainable): this makes teachers.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of the data and of new weights, below 2**32."""

    epochs: PositiveInt = 1
    """Passes over the mixture."""

    max_steps: NonNegativeInt | None = None
    """Stop after this many optimizer steps; 0 makes the student that a run starts with. None: only `epochs` counts."""

    micro_batch_size: Size = 1
    """Samples of one forward pass of one worker."""

    micro_batch_tokens: PositiveInt | None = None
    """Most tokens of one forward pass: a micro-batch of more goes through in parts, with the same result, so that this
    bounds the memory however long samples are. A sample that alone has more goes by itself. None: as a whole."""

    gradient_accumulation_steps: Size = 1
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

    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    """What the student is measured on."""

    output: OutputConfig = Field(default_factory=OutputConfig)
    """The run folder."""

    tune: TuneConfig = Field(default_factory=TuneConfig)
    """A sweep."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = {}
        if self.vision_loss_weight == 0 and self.text_loss_weight == 0:
            problems["text_loss_weight"] = "0 like vision_loss_weight: nothing would be learnt; raise one of them"
        if self.model.revision and os.path.isabs(self.model.name_or_path):
            problems["model.revision"] = f"the folder {self.model.name_or_path} has no revisions; remove it"
        if self.checkpoint.keep_best and not (self.evaluation.every_steps and self.evaluation.sources):
            problems["checkpoint.keep_best"] = "nothing is measured on the way; set evaluation.sources and every_steps"
        if self.cluster.use_gpu and self.cluster.bit_identical:
            problems["cluster.bit_identical"] = "no two runs on GPUs give the same bits; remove it or cluster.use_gpu"
        if self.objective == "sft" and self.max_steps == 0:
            problems["max_steps"] = "0 steps with objective=sft change nothing; raise it"
        if self.objective == "sft" and self.model.teacher_cache != "off":
            problems["model.teacher_cache"] = "there is no teacher with objective=sft; remove it"
        if self.model.fit_tokens is not None and self.model.start == "copy":
            problems["model.fit_tokens"] = "nothing is fitted with start=copy; use start=fit, or remove it"
        if self.objective == "sft":
            problems |= self._useless_with_sft()
        elif self.model.num_hidden_layers is not None:
            problems["model.num_hidden_layers"] = "only objective=sft can add layers; remove it"
        _raise_contradictions(self._problems_of_parts() | problems)
        return self

    def _useless_with_sft(self) -> dict[str, str]:
        """Options that would do nothing with objective=sft, by key."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        names = ("temperature", "vision_loss_weight", "text_loss_weight", "hidden_loss_weight")
        useless = [name for name in names if getattr(self, name) != defaults[name]]
        names = ("num_key_value_layers", "key_value_group_size", "start", "fit_tokens")
        of_student = names if "swiftkv" not in self.trained_parts else ()
        useless += [f"model.{name}" for name in of_student if getattr(self.model, name) is not None]
        problems = dict.fromkeys(useless, "has no effect with objective=sft; remove it")
        if self.model.dtype == "bfloat16" and self.trained_parts == PLAIN_PARTS:
            problems["model.dtype"] = (
                "has no effect with objective=sft where nothing is frozen; remove it, or name the parts that train in "
                "model.trainable"
            )
        return problems

    def _problems_of_parts(self) -> dict[str, str]:
        """What is wrong with the parts that are to train and with their learning rates, by key."""
        problems, given, trained = {}, self.model.trainable, self.trained_parts
        names = " and ".join(trained)
        if self.objective == "distill" and trained != ("swiftkv",):
            problems["model.trainable"] = f"distillation trains swiftkv alone, got {', '.join(given)}; remove it"
        elif "all" in given and len(given) > 1:
            problems["model.trainable"] = "all holds every part of a plain model; give it by itself"
        elif "swiftkv" in trained and len(trained) > 1:
            problems["model.trainable"] = "swiftkv trains by itself, all else stays the teacher's; give no other part"
        elif self.model.num_hidden_layers is not None and "text" not in trained:
            problems["model.num_hidden_layers"] = f"layers are added to the text model, and only {names} would train"
        elif not {"text", "swiftkv"} & {*trained} and self.data.max_images_per_sample == 0:
            problems["data.max_images_per_sample"] = f"0, so that {names} would have no image to learn from; raise it"
        for part in PARTS:
            if getattr(self.optimizer.learning_rates, part) is not None and part not in trained:
                remedy = f", or add {part} to model.trainable" if "swiftkv" not in (part, *trained) else ""
                problems[f"optimizer.learning_rates.{part}"] = f"{part} does not train, but {names}; remove it{remedy}"
        return problems

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of the model that train, in the order of `PARTS`."""
        given = self.model.trainable or (("swiftkv",) if self.objective == "distill" else ("all",))
        return PLAIN_PARTS if "all" in given else tuple(part for part in PARTS if part in given)

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step, over all workers."""
        return self.micro_batch_size * self.gradient_accumulation_steps * max(self.cluster.most_workers, 1)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, _Section)


def source_from_text(text: str) -> dict[str, str]:
    is_path = (
        text.endswith((".jsonl", ".json", ".parquet"))
        or text.startswith((".", "/", "~"))
        or "*" in text
        or text.count("/") > 1
        or os.path.exists(os.path.expanduser(text))
    )
    return {"path": text} if is_path and text != "shapes" else {"name": text}


# Where a run computes, what it keeps and how its data are prepared may change between a run and its resumption.
_DECIDES_NO_NUMBER = (
    "output",
    "checkpoint",
    "cluster",
    "evaluation",
    "tune",
    "data.image_processing_batch_size",
    "data.num_proc",
    "data.cpus_per_task",
    "data.cache_dir",
    "data.max_rejected_fraction",
    "data.on_refused",
    "model.teacher_cache",  # but for the last bits
    "model.teacher_cache_dir",
    "model.gradient_checkpointing",
)


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values, by key such as `cluster.threads_per_worker`. They are not validated again."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            of_section: BaseModel = getattr(config, section)
            assert name in type(of_section).model_fields, key
            name, value = section, of_section.model_copy(update={name: value})
        assert name in type(config).model_fields, key
        config = config.model_copy(update={name: value})
    return config


def changed_keys(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """The keys, such as `optimizer.lr`, in which two configurations would give different numbers, and both values."""
    return dict(_changes(a.model_dump(mode="json"), b.model_dump(mode="json"), ()))


def _changes(a: Any, b: Any, key: tuple[str | int, ...]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    name = ".".join(map(str, key))
    if name in _DECIDES_NO_NUMBER:
        return
    if isinstance(a, list) and isinstance(b, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        for part in {**a, **b}:
            yield from _changes(a.get(part), b.get(part), (*key, part))
    elif a != b:
        yield name, (a, b)
