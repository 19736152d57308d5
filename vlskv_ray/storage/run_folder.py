"""Where a run is written, and how an older one makes room."""

import time
from pathlib import Path

from vlskv_ray.config import Config
from vlskv_ray.storage.run_lock import own_run_folder
from vlskv_ray.words import short_path


def run_folder(config: Config) -> Path:
    """Where a run is written. ValueError where it would be lost."""
    folder = Path(config.output.dir) / str(config.output.name)
    if "/runtime_resources/working_dir_files/" in str(folder):
        raise ValueError(
            f"output.dir: {short_path(Path(config.output.dir))} is in the copy of the working directory that Ray made "
            f"for this job and deletes some time; wanted an absolute path on storage that all machines share, "
            f"such as output.dir=/shared/runs"
        )
    return folder


def move_aside(folder: Path) -> Path:
    """Gives a folder that nobody is using another name, and returns that: nothing is deleted."""
    with own_run_folder(folder):
        older = unused_name(folder)
        folder.rename(older)
    return older


def unused_name(folder: Path) -> Path:
    """What a folder that is there may be called from now on."""
    older = folder.with_name(f"{folder.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
    while older.exists():
        older = older.with_name(f"{older.name}-")
    return older
