"""The command that lists the commands, and what every command answers at once."""

import os
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from waiting import HANG_SECONDS

import vlskv_ray
from vlskv_ray.__main__ import COMMANDS, main

PACKAGE = Path(vlskv_ray.__file__).parent
HEAVY = {"torch", "transformers", "ray", "datasets", "pyarrow", "matplotlib"}
"""Takes seconds to import."""
QUICKSTART = str(PACKAGE / "config" / "shipped" / "quickstart.yaml")
WRONG_CONFIG = ["--config", QUICKSTART, "epochs=many"]
ANSWERED_AT_ONCE: dict[str, list[tuple[list[str], int]]] = {
    "train": [(["--config", QUICKSTART, "--print-config"], 0), (WRONG_CONFIG, 2)],
    "fit": [(WRONG_CONFIG, 2), (["--config", QUICKSTART, "model.start=copy"], 2)],
    "tune": [(WRONG_CONFIG, 2)],
    "probe": [(WRONG_CONFIG, 2), (["--config", QUICKSTART, "objective=sft"], 2)],
    "evaluate": [(["--model", "m", "--data", "rows.jsonl", "--split", "test"], 2)],
    "answers": [(["--model", "m"], 2), (["--model", "m", "--data", "d", "--output", "o.jsonl", "--top-k", "3"], 2)],
    "generate": [(["--model", "m"], 2)],
    "assemble": [(["--text", "m"], 2), (["--text", "m", "--output", "."], 2)],
    "compare": [([], 2)],
    "cache": [(WRONG_CONFIG, 2), (["--config", QUICKSTART, "model.teacher_cache=memory"], 2)],
    "doctor": [(WRONG_CONFIG, 2), (["epochs=1"], 2)],
    "configs": [([], 0), (["quickstart"], 0), (["quickstep"], 2)],
}
"""What each command is asked beside `--help`, and with what status it ends."""


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With a line each; so is `configs`, and no file is a command unnoticed."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == listed
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert set(COMMANDS) == {file.stem for file in PACKAGE.glob("[a-z]*.py") if "\ndef main(" in file.read_text()}


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlskv-ray {vlskv_ray.__version__}\n"


@pytest.mark.parametrize(
    ("name", "told"), [("trian", "did you mean train?"), ("--nothing", "the commands are train, ")]
)
def test_no_such_command(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: unknown command") and told in said


def test_the_script_is_this_command() -> None:
    """The name that pip installs, and `python -m vlskv_ray`."""
    scripts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"vlskv-ray": f"{main.__module__}:{main.__name__}"}
    done = subprocess.run(
        [sys.executable, "-m", "vlskv_ray", "trian"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert (done.returncode, done.stderr) == (2, "trian: unknown command, did you mean train?\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_both_ways_to_a_command_are_one(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (lambda: main([command, "--help"]), lambda: import_module(f"vlskv_ray.{command}").main(["--help"])):
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: vlskv-ray {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_needs_no_model_is_answered_without_torch(command: str, tmp_path: Path) -> None:
    """Help, the resolved config and what is wrong with one: nothing that takes seconds to import is imported."""
    asked = [(["--help"], 0), *ANSWERED_AT_ONCE[command]]
    code = f"""
import sys
from vlskv_ray.__main__ import main
for options in {[options for options, _ in asked]}:
    try:
        status = main([{command!r}, *options])
    except SystemExit as ended:
        status = ended.code
    print(status, *{HEAVY} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    answers = [line for line in done.stderr.splitlines() if line[:1].isdecimal()]
    assert answers == [str(status) for _, status in asked], done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported(number: int) -> None:
    """Ends the command at once, by the status that shells know, without a traceback."""
    command = [sys.executable, "-X", "importtime", "-m", "vlskv_ray", "generate", "--model", "m", "--prompt", "p"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # pytest-xdist ignores SIGINT, which is inherited
    )
    assert process.stderr is not None
    try:
        assert any("| " in line and "torch." in line for line in process.stderr), "torch was not imported"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(HANG_SECONDS) == 128 + number, rest
    finally:
        process.kill()
    assert "Traceback" not in rest and "transformers.models" not in rest
