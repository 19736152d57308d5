"""What runs on the nodes of a cluster before and while workers are started: a node's account of itself, its copy of the
model, one all-reduce with the others, and the network interface that gloo is to use.

These functions travel to the nodes by value (`send_by_value`), and import only what every process of Ray has at hand,
so that asking a node neither costs it an import of torch nor fails where this package is missing.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "pillow")
INTERFACE = "GLOO_SOCKET_IFNAME"
"""The environment variable by which gloo is told; what the user has set there stays."""
REDUCE_SECONDS = 60
"""For all nodes to import torch and reach each other."""


def send_by_value() -> None:
    """Has Ray send the functions of this module as they are here, not as a name to import."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def account(shared: dict[str, str], nonce: str, files: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What this node says of itself.

    Args:
        shared: by key of the config, a file on storage that all nodes share, which holds `nonce`.
        files: by key of the config, the size in bytes of files that must be here too, -1 for a folder.

    Returns:
        `storage`, by key, what is wrong with it, empty where nothing is; `lacking`, by key, the files that are not
        here or not as large; bytes of memory and of /dev/shm that are free; the rest as it is named.
    """
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.utils import estimate_available_memory  # which knows the limits of containers

    address = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return {
        "address": address,
        "versions": versions(),
        "memory": estimate_available_memory(),
        "shm": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "token": is_token_auth_enabled(),
        "interface": os.environ.get(INTERFACE) or interface_of(address),
        "interfaces": sorted(interfaces()),
        "port": port,
        "storage": {key: trouble_with(Path(path), nonce) for key, path in shared.items()},
        "lacking": {key: [path for path in of_key if size_of(path) != of_key[path]] for key, of_key in files.items()},
    }


def versions() -> dict[str, str]:
    """Of all that must be the same on every node; of this package its code too, which changes more often."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    spec = importlib.util.find_spec("vlskv_ray")  # without importing it
    if spec is None or spec.origin is None:
        return found | {"vlskv_ray": "missing"}
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    number = re.search(r'__version__ = "(.*)"', Path(spec.origin).read_text())
    return found | {"vlskv_ray": f"{number and number[1]} (code {digest.hexdigest()[:8]})"}


def trouble_with(file: Path, nonce: str) -> str:
    """What keeps this node from sharing the folder of a file that holds `nonce`; empty where nothing does."""
    try:
        if file.read_text() != nonce:
            return "is another folder"
    except FileNotFoundError:
        return "is another folder" if file.parent.is_dir() else "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    mine = file.with_name(f"{file.name}-{uuid.uuid4().hex}")
    try:
        mine.write_text(nonce)
        mine.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def size_of(path: str) -> int | None:
    """Bytes of a file, -1 for a folder, None where there is nothing to be read."""
    try:
        return -1 if os.path.isdir(path) else os.stat(path).st_size
    except OSError:
        return None


def interfaces() -> dict[str, list[str]]:
    """The addresses of each network interface."""
    import ray  # noqa: F401 - brings psutil with it

    # isort: split
    import psutil

    return {name: [one.address.split("%")[0] for one in of_it] for name, of_it in psutil.net_if_addrs().items()}


def interface_of(address: str) -> str | None:
    """The network interface that carries an address; None where none does, as behind a translation of addresses."""
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def use_interface(wanted: str | None) -> None:
    """Tells gloo in this process which interface to use: the one wanted, else the one by which Ray knows this node.

    Left to itself it takes that of the host's name, which on many machines leads to themselves alone.
    """
    import ray.util

    name = wanted or os.environ.get(INTERFACE) or interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ[INTERFACE] = name
        os.environ["NCCL_SOCKET_IFNAME"] = wanted or os.environ.get("NCCL_SOCKET_IFNAME") or name


def fetch_model(name_or_path: str, revision: str | None) -> dict[str, Any]:
    """Downloads a hub model unless it is here; the sizes of its files by name, or what went wrong."""
    from vlskv_ray.model.build import file_sizes, find_model

    try:
        return {"files": file_sizes(find_model(name_or_path, revision))}
    except ValueError as error:
        return {"error": str(error)}


def all_reduce(rank: int, world_size: int, address: str, port: int, interface: str | None) -> dict[str, Any]:
    """One sum of ones over all nodes, as the workers will add up gradients; `error` is empty where it is right."""
    import torch
    import torch.distributed as dist

    use_interface(interface)
    where, ones = f"tcp://{f'[{address}]' if ':' in address else address}:{port}", torch.ones(1)
    try:
        timeout = timedelta(seconds=REDUCE_SECONDS)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size, timeout=timeout)
        dist.all_reduce(ones)
        return {"error": "" if ones.item() == world_size else f"the sum of {world_size} ones came to {ones.item()}"}
    except (RuntimeError, ValueError) as error:
        return {"error": str(error).strip().splitlines()[0]}
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def process_group(backend: str, interface: str | None, timeout_seconds: int) -> Any:
    """Ray's config of a process group whose workers each `use_interface` before it is made.

    The classes are made here, so that Ray's controller, which they travel to, need not import this package.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_interface, interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return Config(backend=backend, timeout_s=timeout_seconds)
