"""How a worker's part of a run ended. It imports no library: every process of Ray that hands it on can have it."""

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["done", "stopped", "interrupted", "poisoned", "refused", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a worker tells the driver when it ends, the same on every worker.

    `status` is one of: "done", all steps are made, and the model is exported and measured; "stopped", saved and left
    as asked; "interrupted", left at once; "poisoned", step `step` has ended its workers again and again; "refused",
    the model or checkpoint cannot be used; "failed", the run cannot go on.
    """

    status: Status
    step: int = 0
    """Steps that were made; where it is poisoned, the step that was not."""
    message: str = ""
    """Why, where it was refused or failed."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What was seen, where it is done, see `Counts.to_json` in storage/saving.py."""
