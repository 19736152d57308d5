"""A model's tokenizer, processor and chat template, tried in a process of their own.

They are programs of somebody else's: a template computes, a tokenizer matches patterns. One that never ends, takes all
memory or crashes its interpreter takes down this short-lived process, whose end says so, and nothing else. The file is
both sides: `problem_of` starts it, by its path and not as a module of the package, since it needs no torch and starts
four times as fast without.
"""

import functools
import hashlib
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 * 2**30
"""Bytes of address space. The largest real tokenizer, of 262,144 tokens, takes 0.6 GB of it."""
SECONDS = 10
"""Of CPU, for each of the steps: loading the largest real tokenizer takes 2 s, a real template milliseconds."""
WALL_SECONDS = 900
"""For everything, on a machine however busy: what waits for something that does not come is ended."""
MAX_TEXT = 2**20
"""Characters that a template makes of some words."""
TRIED = "where it was tried on a few short texts; wanted what real ones need, seconds and megabytes"
READ = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


@dataclass(frozen=True)
class _Files:
    digest: str
    folder: Path = field(compare=False)  # the same files elsewhere need no second trial


def problem_of(folder: Path) -> str | None:
    """What is wrong with the programs of a folder, as FILE: what happened; None where nothing is.

    Files that were tried before by this process are not tried again.
    """
    digest = hashlib.sha256()
    for path in sorted(path for pattern in READ for path in folder.glob(pattern)):
        if path.name != "model.safetensors.index.json":
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return _problem_of(_Files(digest.hexdigest(), folder.absolute()))


@functools.lru_cache(maxsize=256)
def _problem_of(files: _Files) -> str | None:
    alone = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    alone |= {f"{library}_NUM_THREADS": "1" for library in ("RAYON", "OMP", "OPENBLAS", "MKL")}
    command = [sys.executable, "-P", __file__, str(files.folder)]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=os.environ | alone, timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        return f"{_last_line(error.stdout)}: does not end within {WALL_SECONDS} s where it was tried"
    if result.returncode == 0:
        return None
    what, said = _last_line(result.stdout), _last_line(result.stderr)
    if result.returncode == -signal.SIGXCPU:
        return f"{what}: takes more than {SECONDS} s of CPU {TRIED}"
    if said.startswith("MemoryError") or b"\nmemory allocation of " in b"\n" + result.stderr:
        return f"{what}: takes more than {MEMORY / 2**30:g} GiB of memory {TRIED}"
    if result.returncode < 0:
        said = f"what reads it crashes ({signal.Signals(-result.returncode).name})"
    return f"{what}: cannot be used: {said}"


def _last_line(output: bytes | None) -> str:
    lines = (output or b"").decode(errors="replace").split("\n")
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


# ------------------------------------------------------------------------------------------------- in its own process
def main(folder: str) -> None:
    """Loads and tries what is in the folder; standard output names what is tried, standard error what went wrong."""
    sys.excepthook = lambda kind, error, _: print(f"{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY)
    _begin("its processor")
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if it were not installed: it takes seconds to import
    from jinja2 import TemplateError
    from tokenizers import Tokenizer
    from transformers import AutoProcessor

    if os.path.exists(f"{folder}/tokenizer.json"):
        _begin("tokenizer.json")
        Tokenizer.from_file(f"{folder}/tokenizer.json")
    _begin("its processor")
    processor = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    texts = ["a" * 2000 + "!", " " * 2000 + "1" * 500, "Ünï çødé \n\t 中文 <image></s>"]
    if processor.chat_template is not None:
        _begin(_template_file(folder))
        for messages, options in _conversations():
            try:
                text = processor.apply_chat_template(messages, tokenize=False, **options)
            except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                continue  # a conversation that it does not take: whether it takes ours is seen where that matters
            if len(text) > MAX_TEXT:
                raise ValueError(f"writes {len(text):,} characters for a few words; wanted {MAX_TEXT:,} at most")
            texts.append(text)
    _begin("tokenizer.json")
    tokenizer = getattr(processor, "tokenizer", processor)  # a text model's folder has no other processor
    for text in texts:
        tokenizer(text)


def _limit(kind: int, wanted: int) -> None:
    """Lowers a limit of this process, which may have a lower one already."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _begin(what: str) -> None:
    """Says what comes next, and gives it `SECONDS` of CPU."""
    print(what, flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + SECONDS)


def _template_file(folder: str) -> str:
    """Which file of the folder the processor has its chat template from, as transformers looks for it."""
    own = Path(folder, "processor_config.json")
    if own.exists() and '"chat_template"' in own.read_text():
        return own.name
    names = ("chat_template.json", "chat_template.jinja", "additional_chat_templates")
    return next((name for name in names if Path(folder, name).exists()), "tokenizer_config.json")


def _conversations() -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Short conversations of every shape that data have, and the options they are rendered with."""
    text, image = {"type": "text", "text": "What is this?"}, {"type": "image"}
    questions = ([text], [image, text], [text, image, text], [image, image, text, text])
    system = {"role": "system", "content": [text]}
    for question in questions:
        for turns in (1, 2, 3, 16):
            messages: list[dict[str, Any]] = [
                {"role": ("user", "assistant")[i % 2], "content": [text] if i else question} for i in range(turns)
            ]
            for begin in ([], [system]):
                for opened in (False, True):
                    yield [*begin, *messages], {"add_generation_prompt": opened}


if __name__ == "__main__":
    main(sys.argv[1])
