"""Whether a change of the code changes a number: one run by the code of a commit and by the code here, compared.

    python -m benchmarks.same_numbers COMMIT [--config FILE] [section.key=value ...]

Both runs are made anew, one after the other. Equal must be: every line of metrics.jsonl but for times, every byte of
the final weights, and evaluation.json but for the prefill times in it. Exit status 0 if they are, else 1 and what
differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "per_second", "time_ratio")
"""Parts of the names of figures that are times, or are computed from them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_numbers", allow_abbrev=False)
    parser.add_argument("commit", help="whose code the other run is made by")
    parser.add_argument("--config", default="configs/quickstart.yaml", metavar="FILE", help="default: %(default)s")
    options, overrides = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "code")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), options.commit], check=True)
        try:
            names = (("before", before), ("here", ROOT))
            runs = [make_run(code, Path(folder, name), options.config, overrides) for name, code in names]
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
        different = differences(*runs)
    print("\n".join(different) or f"the numbers of {options.config} are those of {options.commit}, bit for bit")
    return 1 if different else 0


def make_run(code: Path, output: Path, config: str, overrides: Sequence[str]) -> Path:
    """Runs the training command of a checkout; returns the run folder."""
    command = [
        sys.executable,
        "-m",
        "vlskv_ray.train",
        "--config",
        str(code / config),
        f"output.dir={output}",
        *overrides,
    ]
    subprocess.run(command, cwd=code, env=os.environ | {"PYTHONPATH": str(code)}, check=True)
    (run,) = (path.parent for path in output.glob("*/summary.json"))
    return run


def differences(a: Path, b: Path) -> list[str]:
    """What differs between the numbers of two finished runs, a line each."""
    found = []
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (a, b)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"metrics.jsonl: {len(lines[0])} and {len(lines[1])} lines")
    for one, other in zip(*lines, strict=False):
        if untimed(one) != untimed(other):
            found.append(f"metrics.jsonl: step {one['step']}: {untimed(one)} and {untimed(other)}")
    for name in sorted({path.name for run in (a, b) for path in (run / "final").glob("*.safetensors")}):
        contents = [(run / "final" / name).read_bytes() if (run / "final" / name).exists() else b"" for run in (a, b)]
        if contents[0] != contents[1]:
            found.append(f"final/{name}: {len(contents[0])} and {len(contents[1])} bytes, not the same")
    evaluations = [untimed(json.loads((run / "evaluation.json").read_text())) for run in (a, b)]
    if evaluations[0] != evaluations[1]:
        keys = [key for key in evaluations[0] | evaluations[1] if evaluations[0].get(key) != evaluations[1].get(key)]
        found.append(f"evaluation.json: {', '.join(keys)} are not the same")
    return found


def untimed(value: Any) -> Any:
    """Figures without those that are times."""
    if isinstance(value, dict):
        return {key: untimed(v) for key, v in value.items() if not any(part in key for part in TIMES)}
    return [untimed(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
