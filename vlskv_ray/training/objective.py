"""What a run can have for its `objective`: an entry of `OBJECTIVES` holds all in which one differs from another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlskv_ray.config import Config
from vlskv_ray.data.collate import Batch
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.model.build import (
    ModelFiles,
    build_plain,
    build_student,
    check_growth,
    device_of,
    refuse_student,
    swiftkv_config,
    with_layers,
)
from vlskv_ray.model.parts import SWIFTKV
from vlskv_ray.training.distill import DistillationLoss, LossSums
from vlskv_ray.training.run import Run
from vlskv_ray.training.sft import CrossEntropyLoss

Loss = Callable[[Any, Batch], tuple[Tensor | None, LossSums]]
"""Of model and micro-batch: the loss as a sum with a graph, and all sums; see `distillation_loss`."""

SIDES = ("teacher", "student_before", "student")
"""Who answers where there is a student."""


@dataclass(frozen=True)
class Objective:
    """What a run trains, by which loss, and what is measured and said of it."""

    name: str
    """Its value in the config."""
    title: str
    description: str
    """What the run does, for a reader: above its report, and in full."""
    origin: str
    tags: tuple[str, ...]
    """For the model card: how what trains came to what it is, and the tags of the model."""
    has_student: bool
    """A student trains, whose teacher is the same model with SwiftKV off; else a plain model or parts of it do."""
    configure: Callable[[PreTrainedConfig, ModelFiles, Config], PreTrainedConfig]
    """The model that trains, from the teacher's config. ValueError where the model cannot be had."""
    build: Callable[[ModelFiles, Config], Any]
    """The model itself, on the CPU."""
    loss: Callable[[Config, TeacherCache | None], Loss]
    sides: tuple[str, ...]
    """Whose answers to held-out questions are compared, the one that trains last."""
    metrics: Callable[[LossSums, Config], dict[str, float]]
    """The means of a step by their names in metrics.jsonl; those of which the step has none are left out."""
    prefix: str
    loss_title: str
    """Of the metrics of samples with and without images, `PREFIX_vision` and `PREFIX_text`, and what they measure."""
    agreement: str
    agreement_title: str
    """The metric of how many tokens the model gets right, and what it measures."""
    score: Callable[[Mapping[str, float]], float | None]
    """How good a checkpoint is by what was measured of it on the way, the lower the better; None if nothing was."""

    @property
    def trained_side(self) -> str:
        return self.sides[-1]


def objective_of(config: Config) -> Objective:
    """The objective that a run's config names."""
    return objective_named(config.objective, config.trained_parts)


def made_by(config: Config) -> str:
    """What made the student of a run, last: distilled, fine-tuned, fitted or copied."""
    if config.max_steps == 0:
        return "fitted" if config.model.start == "fit" else "copied"
    return {"distill": "distilled", "sft": "fine-tuned"}[config.objective]


def objective_named(name: str, trained_parts: Sequence[str]) -> Objective:
    """The objective of this name, where these parts of the model train."""
    return STUDENT_FINE_TUNING if name == "sft" and SWIFTKV in trained_parts else OBJECTIVES[name]


def build_model(run: Run) -> Any:
    """The model that a run trains, on the device it is used on: all else goes by where the model is."""
    device = device_of("cuda" if run.config.cluster.use_gpu else "cpu")
    return objective_of(run.config).build(run.model_files, run.config).to(device)


# ------------------------------------------------------------------------------------------------------- distillation
def configure_student(config: PreTrainedConfig, files: ModelFiles, run: Config) -> PreTrainedConfig:
    return swiftkv_config(config, run.model.num_key_value_layers, run.model.key_value_group_size)


def build_the_student(files: ModelFiles, run: Config) -> Any:
    options = run.model
    return build_student(
        files,
        options.num_key_value_layers,
        options.key_value_group_size,
        attn_implementation=options.attn_implementation,
        dtype=getattr(torch, options.dtype),
    )


def distillation_loss_of(run: Config, cache: TeacherCache | None) -> Loss:
    return DistillationLoss(
        temperature=run.temperature,
        vision_loss_weight=run.vision_loss_weight,
        text_loss_weight=run.text_loss_weight,
        hidden_loss_weight=run.hidden_loss_weight,
        logits_memory_mib=run.model.logits_memory_mib,
        cache=cache,
    )


def distillation_metrics(sums: LossSums, run: Config) -> dict[str, float]:
    count, metrics = sums.supervised_tokens, {}
    if count:
        metrics = {"loss": sums.loss / count, "top1_agreement": sums.top1 / count}
        metrics |= {"teacher_ce": sums.teacher_ce / count, "student_ce": sums.student_ce / count}
        metrics |= {"hidden_loss": sums.hidden / count} if run.hidden_loss_weight else {}
    if sums.tokens_vision:
        metrics["kl_vision"] = sums.kl_vision / sums.tokens_vision
    if sums.tokens_text:
        metrics["kl_text"] = sums.kl_text / sums.tokens_text
    return metrics


# ------------------------------------------------------------------------------------------------------- fine-tuning
def configure_plain(config: PreTrainedConfig, files: ModelFiles, run: Config) -> PreTrainedConfig:
    refuse_student(files, config)
    has, wanted = config.text_config.num_hidden_layers, run.model.num_hidden_layers
    check_growth(files, has, wanted)
    return with_layers(config, wanted or has)


def build_the_plain(files: ModelFiles, run: Config) -> Any:
    options = run.model
    return build_plain(
        files,
        options.num_hidden_layers,
        attn_implementation=options.attn_implementation,
        seed=run.seed,
        trained=run.trained_parts,
        dtype=getattr(torch, options.dtype),
    )


def fine_tuning_metrics(sums: LossSums, run: Config) -> dict[str, float]:
    count, metrics = sums.supervised_tokens, {}
    if count:
        metrics = {"loss": sums.loss / count, "token_accuracy": sums.top1 / count}
    if sums.tokens_vision:
        metrics["ce_vision"] = sums.ce_vision / sums.tokens_vision
    if sums.tokens_text:
        metrics["ce_text"] = sums.ce_text / sums.tokens_text
    return metrics


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(
            name="distill",
            title="SwiftKV by distillation",
            description="distillation of the model from itself",
            origin="distilled from the model itself",
            tags=("swiftkv", "vlskv_ray", "knowledge-distillation"),
            has_student=True,
            configure=configure_student,
            build=build_the_student,
            loss=distillation_loss_of,
            sides=SIDES,
            metrics=distillation_metrics,
            prefix="kl",
            loss_title="KL from the teacher",
            agreement="top1_agreement",
            agreement_title="top-1 agreement",
            score=lambda measured: measured.get("eval_kl_mean"),
        ),
        Objective(
            name="sft",
            title="supervised fine-tuning",
            description="supervised fine-tuning",
            origin="fine-tuned on answers",
            tags=("vlskv_ray",),
            has_student=False,
            configure=configure_plain,
            build=build_the_plain,
            loss=lambda run, cache: CrossEntropyLoss(run.model.logits_memory_mib),
            sides=("sft_model",),
            metrics=fine_tuning_metrics,
            prefix="ce",
            loss_title="cross-entropy",
            agreement="token_accuracy",
            agreement_title="right tokens",
            score=lambda measured: -measured["eval_accuracy"] if "eval_accuracy" in measured else None,
        ),
    )
}
"""By their names in the config. A further objective is one more entry, and its name in `Config.objective`."""

STUDENT_FINE_TUNING = replace(
    OBJECTIVES["sft"],
    title="supervised fine-tuning of SwiftKV",
    description="supervised fine-tuning of the SwiftKV weights",
    tags=("swiftkv", "vlskv_ray"),
    has_student=True,
    configure=configure_student,
    build=build_the_student,
    sides=SIDES,
)
"""What `objective: sft` is where a student's SwiftKV weights train."""
