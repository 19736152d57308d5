"""Runs of two workers under Ray, left alone and not."""

import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clusters import Command, plan_faults, worker_processes
from conftest import conversation, picture
from runs import assert_ended_as, lines
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlskv_ray import evaluate
from vlskv_ray.cluster.shares import Reserved
from vlskv_ray.config import ClusterConfig
from vlskv_ray.data.images import load_image
from vlskv_ray.launch.on_ray import backend_of, is_lost_controller, share_of_worker
from vlskv_ray.model.swiftkv import swiftkv_backbone
from vlskv_ray.training.objective import SIDES


@pytest.mark.ray
def test_two_workers_on_real_files(left_alone: Path, teacher_folder: Callable[..., Path]) -> None:
    """Every good sample once an epoch, every bad one listed, a loss that falls, only SwiftKV weights moved."""
    steps = 7
    metrics = lines(left_alone / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 3 * steps + 1))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    good, bad = [], ["chat.jsonl:9", "chat.jsonl:14", "chat.jsonl:22"]
    good = [i for i in [f"chat.jsonl:{n}" for n in range(1, 41)] if i not in bad]
    good += [f"more.parquet:{n}" for n in range(1, 13)]
    order = [i for line in lines(left_alone / "order.jsonl") for batch in line["micro_batches"] for i in batch]
    assert Counter(order) == dict.fromkeys(good, 3)
    for epoch in range(3):
        of_epoch = lines(left_alone / "order.jsonl")[epoch * steps : (epoch + 1) * steps]
        assert {i for line in of_epoch for batch in line["micro_batches"] for i in batch} == set(good)
    assert Counter(row["id"] for row in lines(left_alone / "rejected.jsonl")) == dict.fromkeys(bad, 3)

    final = load_file(left_alone / "final" / "model.safetensors")
    stock = load_file(teacher_folder() / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in stock.items())
    assert {name for name in final if name not in stock} == {name for name in final if "_swiftkv" in name}


@pytest.mark.ray
def test_two_workers_measure_what_one_process_does(left_alone: Path, tmp_path: Path) -> None:
    """Each its share of the held-out samples, together all of them; on the way too."""
    assert [m["step"] for m in lines(left_alone / "metrics.jsonl") if "eval_accuracy" in m] == [10, 20]
    arguments = [
        "--model",
        str(left_alone / "final"),
        "--max-new-tokens",
        "4",
        "--output",
        str(tmp_path / "again.json"),
    ]
    assert evaluate.main(arguments) == 0
    ours, again = (json.loads(path.read_text()) for path in (left_alone / "evaluation.json", tmp_path / "again.json"))
    assert ours["questions"] == again["questions"] == 12
    for side in SIDES:
        for name in ("accuracy", "kl_mean", "kl_p95", "top1_agreement", "agreed_prefix", "cross_entropy"):
            assert ours[side][name] == pytest.approx(again[side][name], rel=1e-4, abs=1e-7), (side, name)


@pytest.mark.ray
def test_the_student_answers_about_a_new_image(left_alone: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(left_alone / "final")
    processor = AutoProcessor.from_pretrained(left_alone / "final")
    text = processor.apply_chat_template(conversation("what is it?", images=1), add_generation_prompt=True)
    inputs = processor(
        text=text, images=load_image(picture(123, 77, 99)), add_special_tokens=False, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 6
    assert swiftkv_backbone(model).config.swiftkv and len(model._forward_pre_hooks) == 1


@pytest.mark.ray
def test_the_readmes_snippet_runs(left_alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this run's student, as it stands there; the random model says something, if only syllables."""
    root = Path(__file__).parents[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    for path, there in (("runs/quickstart/final", left_alone / "final"), ("docs/shapes.png", root / "docs/shapes.png")):
        assert path in snippet
        snippet = snippet.replace(path, str(there))
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.ray
def test_whatever_is_lost_it_ends_with_the_same_bits(
    cluster: dict[str, str], files: Path, left_alone: Path, planned: Path
) -> None:
    """In one run: a worker is asked to end, and one is killed while it saves. A data worker is killed, the controller,
    and the next controller while it starts its workers. The command is asked to stop. When the run goes on a worker
    does not answer: the other one notices, and says what it waited for. test_faults_ray.py has many more moments."""
    run, arguments = files / "runs" / "lost", ("train", "--config", str(files / "run.yaml"), "output.name=lost")
    moments = [("micro_batch", 2, 1, "term"), ("micro_batch", 6, 1, "wait"), ("save_renamed", 8, 0, "kill")]
    moments += [("micro_batch", 13, 0, "wait"), ("micro_batch", 16, 0, "wait")]
    plan_faults(planned, *moments)
    process = Command(*arguments, "cluster.max_failures=4", env=cluster)
    for i, title in ((1, b"MapWorker"), (3, b"TrainController")):
        process.wait_until((planned / f"{i:02}.json.done").exists)
        victims = worker_processes(title)
        assert victims, title
        os.kill(victims[0], signal.SIGKILL)
        (planned / f"{i:02}.json.go").touch()
    process.wait_until(lambda: worker_processes(b"TrainController") not in ([], victims))
    process.wait_until(worker_processes)  # they have not come so far as to say what is reserved for them
    for pid in worker_processes(b"TrainController"):
        os.kill(pid, signal.SIGKILL)
    process.wait_until((planned / "04.json.done").exists)
    process.send_signal(signal.SIGTERM)
    process.wait_until((run / "STOP").exists)
    (planned / "04.json.go").touch()
    assert process.ended(143).count("Ray's controller of this run was lost or gave up") == 2
    assert len(list(planned.glob("*.done"))) == len(moments)
    assert not (run / "final").exists()

    plan_faults(planned, ("micro_batch", 18, 1, "stop"))
    Command(*arguments, "--resume", "must", "cluster.stall_seconds=5", env=cluster).ended()
    stacks = "".join(path.read_text() for path in (run / "stacks").iterdir())
    assert "Timeout (" in stacks and "all_reduce" in stacks
    assert_ended_as(run, left_alone)


def test_what_ray_is_asked_for() -> None:
    """A GPU each where the config says so, and by what tensors of either kind travel."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

    for use_gpu, resources in ((False, {"CPU": 2.5}), (True, {"CPU": 2.5, "GPU": 1})):
        cluster = ClusterConfig(num_workers=3, use_gpu=use_gpu)
        asked = ScalingConfig(num_workers=3, **share_of_worker(cluster, Reserved(2.5, 1, 1, 1)))
        assert asked.use_gpu == use_gpu and asked.resources_per_worker == resources
        assert asked.total_resources == {name: 3 * count for name, count in resources.items()}
        backends = TorchConfig(backend=backend_of(cluster)).backend
        assert torch.distributed.BackendConfig(torch.distributed.Backend(backends)).get_device_backend_map() == (
            {"cpu": "gloo", "cuda": "nccl"} if use_gpu else {"cpu": "gloo", "cuda": "gloo"}
        )


def test_what_ray_gives_up_on_is_started_again() -> None:
    """A worker that dies while its group is being started; not what is wrong with the run itself."""
    from ray.exceptions import ActorDiedError, OutOfMemoryError
    from ray.train import ControllerError

    lost = is_lost_controller
    assert lost(ActorDiedError()) and lost(ControllerError(ActorDiedError())) and lost(OutOfMemoryError("full"))
    assert not lost(ControllerError(ValueError("x"))) and not lost(ValueError("x")) and not lost(None)
