"""What nodes say of themselves, against what a run needs of them: a pure judgement, in words that say what to do."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlskv_ray.words import format_bytes

TIGHT = 1.3
"""Memory is tight below so many times what a worker holds without activations."""
SHOWN_FILES = 3

Report = dict[str, Any]
"""What `node.account` returns, with `id`, `cpus` and `name` of the node; or `error`, where it did not answer."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; the text of a problem says what to do."""

    mark: Literal["ok", "warning", "problem"]
    what: str
    text: str


@dataclass(frozen=True)
class Need:
    """What a run needs of its nodes; the defaults: nothing."""

    shared: dict[str, Path] = field(default_factory=dict)
    """Folders that all nodes share, by key of the config."""
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes of the files that must be on all nodes, -1 of folders, by key of the config."""
    hub_model: tuple[str, str] | None = None
    """Id and commit of a model that is downloaded to each node."""
    hub_files: dict[str, int] = field(default_factory=dict)
    """Bytes of its files, by name."""
    workers: int = 0
    cpus_per_worker: float = 1.0
    weight_bytes: int = 0
    """Of a worker, the weights alone."""
    worker_bytes: int = 0
    """Of a worker with gradients and what the optimizer keeps, but neither activations nor libraries."""
    interface: str | None = None


def findings_of(reports: Sequence[Report], need: Need, here: dict[str, str] | None = None) -> list[Finding]:
    """What is to be said of what nodes have answered; `here`: the versions of this process."""
    heard = [report for report in reports if "error" not in report]
    silent = [f"{report['name']}: {report['error']}" for report in reports if "error" in report]
    found = [Finding("problem", "answers", f"a node cannot be asked what it has for the run: {'; '.join(silent)}")]
    return [
        *(found if silent else []),
        *of_storage(heard, need.shared),
        of_versions(heard, here or {}),
        *of_memory(heard, need),
        *of_files(heard, need.files),
        *of_interfaces(heard, need.interface),
    ]


def problems_of(found: Iterable[Finding]) -> list[str]:
    """A line each."""
    return [finding.text for finding in found if finding.mark == "problem"]


def of_storage(reports: Sequence[Report], shared: dict[str, Path]) -> Iterator[Finding]:
    for key, folder in shared.items():
        wrong = joined(f"{one['storage'][key]} on node {one['name']}" for one in reports if one["storage"].get(key))
        if wrong:
            remedy = "wanted storage that all nodes share and may write; mount it there under the same path"
            yield Finding("problem", "storage", f"{key}: {folder} {wrong}; {remedy}, or set {key} to such a folder")
        else:
            yield Finding("ok", "storage", f"{key} is shared")


def of_versions(reports: Sequence[Report], here: dict[str, str]) -> Finding:
    versions = {one["name"]: one["versions"] for one in reports} | ({"this command": here} if here else {})
    who: dict[str, dict[str, list[str]]] = {}
    for name, of_one in versions.items():
        for package, version in of_one.items():
            who.setdefault(package, {}).setdefault(version, []).append(name)
    differing = [
        f"{package} {' and '.join(f'{version} on {joined(names)}' for version, names in by_version.items())}"
        for package, by_version in who.items()
        if len(by_version) > 1
    ]
    if differing:
        remedy = "wanted the same on all nodes and for this command; install the same there"
        return Finding("problem", "versions", f"versions differ: {'; '.join(differing)}; {remedy}")
    return Finding("ok", "versions", "versions are the same")


def of_memory(reports: Sequence[Report], need: Need) -> Iterator[Finding]:
    on_nodes = list(zip(reports, shares([one["cpus"] for one in reports], need), strict=True))
    free = {one["name"]: format_bytes(one["memory"]) for one in reports}
    short = [(one, workers) for one, workers in on_nodes if workers * need.weight_bytes > one["memory"]]
    tight = [(one, workers) for one, workers in on_nodes if workers * need.worker_bytes * TIGHT > one["memory"]]
    lower = "use fewer of cluster.num_workers, model.dtype=bfloat16, or nodes with more memory"
    if short:
        where = joined(f"{workers} on node {one['name']} with {free[one['name']]} free" for one, workers in short)
        need_alone = f"a worker needs {format_bytes(need.weight_bytes)} for the weights alone"
        yield Finding("problem", "memory", f"cluster.num_workers: {need_alone}, and there will be {where}; {lower}")
    elif tight:
        where = joined(f"{workers} on node {one['name']} with {free[one['name']]} free" for one, workers in tight)
        needs = f"a worker needs {format_bytes(need.worker_bytes)} without activations and libraries"
        yield Finding("warning", "memory", f"memory is tight: {needs}, and there will be {where}; {lower}")
    elif need.workers:
        yield Finding(
            "ok", "memory", f"{format_bytes(need.worker_bytes)} of memory a worker, without activations, are there"
        )


def shares(cpus: Sequence[float], need: Need) -> list[int]:
    """How many workers come to nodes of so many CPUs: Ray spreads them, one each in turn where there is room."""
    room = [int((count + 1e-6) // need.cpus_per_worker) for count in cpus]
    given, left = [0] * len(cpus), min(need.workers, sum(room))
    while left:
        for i in range(len(cpus)):
            if left and given[i] < room[i]:
                given[i], left = given[i] + 1, left - 1
    return given


def of_files(reports: Sequence[Report], files: dict[str, dict[str, int]]) -> Iterator[Finding]:
    for key, paths in files.items():
        lacking = joined(f"{some(one['lacking'][key])} on node {one['name']}" for one in reports if one["lacking"][key])
        if lacking:
            cached = "; Parquet and hub data are read from data.cache_dir" if "sources" in key else ""
            remedy = "wanted the same files under the same paths on all nodes, as shared storage has them"
            yield Finding("problem", "files", f"{key}: missing or of another size: {lacking}; {remedy}{cached}")
        elif paths:
            yield Finding("ok", "files", f"{key} is there")


def of_interfaces(reports: Sequence[Report], interface: str | None) -> Iterator[Finding]:
    without = [one for one in reports if interface and interface not in one["interfaces"]]
    if without:
        has = joined(f"node {one['name']} has {', '.join(one['interfaces'])}" for one in without)
        yield Finding("problem", "network", f"cluster.network_interface: wanted {interface!r} on all nodes, but {has}")


def of_hub_model(answers: Sequence[Report], need: Need) -> Finding:
    """`answers`: what `node.fetch_model` returned."""
    wrong = [f"node {one['name']}: {one['error']}" for one in answers if "error" in one]
    for one in answers:
        differing = sorted(name for name, count in need.hub_files.items() if one.get("files", {}).get(name) != count)
        if differing and "error" not in one:
            wrong.append(f"node {one['name']}: {some(differing)} not whole there, delete the model from its HF_HOME")
    if wrong:
        assert need.hub_model is not None
        return Finding("problem", "model", f"model.name_or_path: {need.hub_model[0]} is not on {'; '.join(wrong)}")
    return Finding("ok", "model", "the model is on all nodes")


def of_all_reduce(answers: Sequence[Report], interface: str | None) -> Finding:
    wrong = [
        f"node {one['name']} by {interface or one['interface'] or 'no interface of that address'}: {one['error']}"
        for one in answers
        if one["error"]
    ]
    if wrong:
        return Finding(
            "problem",
            "network",
            f"cluster.network_interface: {interface or 'not set'}; the nodes do not reach each other by gloo, "
            f"{'; '.join(wrong)}; open all ports between them, and name an interface of a network that joins them; a "
            f"host name that means 127.0.0.1 is the usual cause where no interface carries the address",
        )
    return Finding("ok", "network", f"gloo adds up over {len(answers)} nodes")


def joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def some(paths: Sequence[str]) -> str:
    more = len(paths) - SHOWN_FILES
    return joined(paths[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
