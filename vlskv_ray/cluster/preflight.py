"""Before any worker loads a model: what a run needs of the nodes of its cluster, asked of all of them at once.

On a cluster that this command has started, on this machine and for itself, only the memory can fail, so no node is
asked. Nodes that join later, as elastic runs let them, are not asked either.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlskv_ray.cluster import node
from vlskv_ray.cluster.findings import Finding, Need, Report, findings_of, of_all_reduce, of_hub_model, problems_of
from vlskv_ray.cluster.shares import Cluster, Reserved
from vlskv_ray.command import print_info
from vlskv_ray.data.sources import Source, SourceSpec
from vlskv_ray.model import presets
from vlskv_ray.model.build import file_sizes
from vlskv_ray.training.objective import objective_of
from vlskv_ray.training.run import Run

ANSWER_SECONDS = 120
"""For a node to start a process and answer."""
SETTLE_SECONDS = 5.0
"""After which memory that is too little is looked at again: a run that was killed just now may still hold it."""


def need_of(run: Run, sources: Sequence[Source], reserved: Reserved) -> Need:
    """What a run needs; all that it looks for is on this machine already."""
    config, model = run.config, run.model_files
    frozen, trained = (sum(sizes.values()) for sizes in (run.frozen_parameters, run.trained_parameters))
    weights = frozen * (2 if config.model.dtype == "bfloat16" else 4) + 4 * trained  # what trains is float32
    # a plain model is read in float32, and what is frozen of it rounded then
    loading = weights if objective_of(config).has_student else 4 * (frozen + trained)
    shared = {"output.dir": existing(run.folder)}
    if run.cache is not None and not run.cache.temporary:
        shared["model.teacher_cache_dir"] = existing(run.cache.folder)
    files = {"data.sources": paths_of(config.data.sources, sources)}
    if run.held_out is not None:
        files["evaluation.sources"] = paths_of(config.evaluation.sources, run.held_out.sources)
    if model.folder and model.folder not in presets.SHIPPED.values() and not model.revision:
        files["model.name_or_path"] = {str(model.folder / name): count for name, count in file_sizes(model).items()}
    return Need(
        shared=shared,
        files=files,
        hub_model=(model.name_or_path, model.revision) if model.revision else None,
        hub_files=file_sizes(model) if model.revision else {},
        workers=config.cluster.most_workers,
        cpus_per_worker=reserved.cpus_per_worker,
        weight_bytes=loading,
        worker_bytes=max(loading, weights + 3 * 4 * trained),  # a gradient and two moments
        interface=config.cluster.network_interface,
    )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def paths_of(specs: Iterable[SourceSpec], sources: Iterable[Source]) -> dict[str, int]:
    """Bytes of each file that reading rows opens, -1 of the folders of images that are named."""
    paths = {str(path): path.stat().st_size for source in sources for path in source.files}
    return paths | {spec.image_root: -1 for spec in specs if spec.image_root}


def check_nodes(run: Run, sources: Sequence[Source], reserved: Reserved, cluster: Cluster) -> None:
    """Prints what may go wrong. ValueError for what will, all of it at once and before a worker has loaded anything."""
    found = examine(need_of(run, sources, reserved), cluster)[1]
    for finding in found:
        if finding.mark == "warning":
            print_info(run.config, f"warning: {finding.text}")
    if problems_of(found):
        raise ValueError("\n".join(problems_of(found)))
    if cluster.joined:
        print_info(run.config, f"nodes         {'; '.join(finding.text for finding in found if finding.mark == 'ok')}")


def examine(need: Need, cluster: Cluster, patience: int = 2) -> tuple[list[Report], list[Finding]]:
    """What each node that has CPUs says, and what is to be said of it, in the Ray that this process is connected to.

    Args:
        need: of the run.
        cluster: which that Ray is.
        patience: how many times it is all asked again where memory is too little.
    """
    import ray

    nodes = [
        {
            "id": one["NodeID"],
            "cpus": one["Resources"]["CPU"],
            "name": f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})",
        }
        for one in ray.nodes()
        if one["Alive"] and one["Resources"].get("CPU")
    ]
    node.send_by_value()
    with nonce_in(need.shared) as (shared, nonce):
        what = (shared, nonce, need.files)
        if cluster.joined:
            reports = ask(nodes, node.account, [what] * len(nodes), ANSWER_SECONDS)
        else:
            reports = [nodes[0] | node.account(*what)]  # this machine, which is known without a task
    found = findings_of(reports, need, here=node.versions())
    if patience and any(finding.mark == "problem" and finding.what == "memory" for finding in found):
        time.sleep(SETTLE_SECONDS)  # Ray and the system give memory back some seconds after a process has ended
        return examine(need, cluster, patience - 1)
    if not cluster.joined:
        return reports, found
    # what takes long or downloads much comes last, and only where nothing is wrong so far
    if need.hub_model and not problems_of(found):
        found.append(of_hub_model(ask(nodes, node.fetch_model, [need.hub_model] * len(nodes), None), need))
    if len(nodes) > 1 and not problems_of(found):
        meeting_point = (reports[0]["address"], reports[0]["port"], need.interface)
        ranks = [(rank, len(nodes), *meeting_point) for rank in range(len(nodes))]
        answers = ask(reports, node.all_reduce, ranks, ANSWER_SECONDS + node.REDUCE_SECONDS)
        found.append(of_all_reduce(answers, need.interface))
    return reports, found


def ask(
    nodes: Sequence[Report], function: Callable[..., Report], arguments: Sequence[Any], seconds: float | None
) -> list[Report]:
    """What is known of each node, with what a function returns there, run on all at once; `error` where it does not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # no CPUs: a node whose CPUs others hold must answer too; no retries: a second try would only wait once more
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    pinned = [NodeAffinitySchedulingStrategy(one["id"], soft=False) for one in nodes]
    asked = [
        remote.options(scheduling_strategy=where).remote(*mine) for where, mine in zip(pinned, arguments, strict=True)
    ]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=seconds)
    return [
        one | answer_of(task, seconds if task not in done else None) for one, task in zip(nodes, asked, strict=True)
    ]


def answer_of(reference: Any, waited: float | None) -> Report:
    """What a task returned; where it has not after `waited` seconds, it is given up."""
    import ray

    if waited is not None:
        ray.cancel(reference, force=True)
        return {"error": f"no answer within {waited:g} s"}
    try:
        answer: Report = ray.get(reference)
    except ray.exceptions.RayError as error:  # the node or the process is gone, a package is missing there
        return {"error": " ".join(str(error).split())[-300:]}
    return answer


@contextmanager
def nonce_in(folders: dict[str, Path]) -> Iterator[tuple[dict[str, str], str]]:
    """A file in each folder that holds what nobody else can know, and what that is."""
    nonce = secrets.token_hex(8)  # a folder of the same name on a node of its own would hold another, or none
    files = {key: folder / f".preflight-{nonce}" for key, folder in folders.items()}
    try:
        for key, file in files.items():
            try:
                file.write_text(nonce)
            except OSError as error:
                raise ValueError(f"{key}: {file.parent} cannot be written: {error.strerror}") from None
        yield {key: str(file) for key, file in files.items()}, nonce
    finally:
        for file in files.values():
            with suppress(OSError):
                file.unlink()
