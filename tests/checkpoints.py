"""Checkpoints as somebody else may have changed them."""

import hashlib
import json
from pathlib import Path
from typing import Any


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def entry_of(path: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}


def commit(folder: Path) -> None:
    (folder / "COMMIT").write_text(hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())


def seal(folder: Path, **more: Any) -> None:
    """Makes manifest and COMMIT fit what lies there; `more` stands in the manifest too."""
    files = [path for path in folder.iterdir() if path.name not in ("manifest.json", "COMMIT")]
    manifest = {path.name: entry_of(path) for path in files if path.is_file()}
    (folder / "manifest.json").write_text(json.dumps(manifest | more))
    commit(folder)


def with_state(folder: Path, **changed: Any) -> None:
    state = json.loads((folder / "state.json").read_text()) | changed
    (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if v is not ...}, default=str))
    seal(folder)
