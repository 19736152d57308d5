"""A run as its workers know it, what may end it, and how they tell each other things."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vlskv_ray.config import Config
from vlskv_ray.data.plan import Tokens
from vlskv_ray.data.questions import HeldOut
from vlskv_ray.data.teacher_cache import TeacherCache
from vlskv_ray.model.build import ModelFiles, find_model

WAITING = Path("ray", "waiting")
"""In the folder of a run: lines on what is waited for before its workers can start."""
START = "start.safetensors"
"""In the folder of a run: the keys' and values' weights that a fitted student starts with."""


@dataclass(frozen=True)
class FitPlan:
    """What a student is fitted to before its first step."""

    samples: tuple[tuple[int, ...], ...]
    """The numbers in the plan of the samples of each micro-batch; they do not depend on the number of workers."""
    kept: Path
    """The file of this very fit, for any run."""
    tokens: int = 0
    """In these samples, about."""


@dataclass(frozen=True)
class Run:
    """What every worker is told about the run, the same for all of them."""

    config: Config
    folder: Path
    """On storage that every worker shares."""
    micro_batches_per_step: int
    steps_per_epoch: int
    total_steps: int
    fingerprints: dict[str, str]
    """Of model, data and versions: a run goes on only with the same."""
    shares_per_step: int = 1
    tokens: Tokens = Tokens()  # noqa: RUF009 - cannot be changed
    """By which the plan shares out work, see `Plan`; fixed when a run starts."""
    watches_nodes: bool = False
    """The cluster may tell that a node is about to be taken away."""
    owner: str = ""
    """Whose the run folder is while this holds, see `storage/run_lock.py`."""
    cache: TeacherCache | None = None
    """Where the frozen states of samples are kept; None: nowhere."""
    fit: FitPlan | None = None
    """How the student starts; None: as it is loaded, its weights copied where they are new."""
    held_out: HeldOut | None = None
    """What answers are measured on; None: nothing was given."""
    parameters: dict[str, int] = field(default_factory=dict)
    """How many weights each part of the model has."""

    @functools.cached_property
    def model_files(self) -> ModelFiles:
        """Where this process has the model: each machine has its own copy of a hub model."""
        return find_model(self.config.model.name_or_path, self.config.model.revision)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to other processes: not where the model is here."""
        return {name: value for name, value in self.__dict__.items() if name != "model_files"}

    @property
    def trained_parameters(self) -> dict[str, int]:
        """How many weights train, by part."""
        return {part: size for part, size in self.parameters.items() if part in self.config.trained_parts}

    @property
    def frozen_parameters(self) -> dict[str, int]:
        """How many weights stay as they are, by part."""
        return {part: size for part, size in self.parameters.items() if part not in self.config.trained_parts}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def start_file(self) -> Path:
        return self.folder / START

    @property
    def stop_file(self) -> Path:
        """Made by the driver to ask for a stop: the workers save at the end of the step they are in."""
        return self.folder / "STOP"

    @property
    def first_step_file(self) -> Path:
        """The first of the steps that the data workers are at, see `ray_dataset`."""
        return self.folder / "ray" / "first_step"

    @property
    def waiting_file(self) -> Path:
        """Lines on what is waited for before the workers can start."""
        return self.folder / WAITING

    @property
    def attempt_file(self) -> Path:
        """Which step is being made, see `Attempts`."""
        return self.folder / "attempt.json"


@dataclass(frozen=True)
class Worker:
    """Which of the workers this one is."""

    rank: int = 0
    world_size: int = 1
    is_warned: Callable[[], bool] = lambda: False
    """Whether a node of the workers is about to be taken away; all of them ask equally often, and hear the same."""


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(mine: Any) -> list[Any]:
    """What every worker has, by rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
