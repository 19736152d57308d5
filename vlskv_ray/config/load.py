"""Reading and writing a run's configuration.

Reading goes one way: YAML text -> `Draft` (plain values, and the line each came from) -> keys of the original layout
renamed -> overrides -> `Config` (frozen). Every problem found on the way is one line, `file:line: key: what is wrong`,
and all of them are reported together.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from vlskv_ray.config.draft import FLOAT, ConfigError, Draft
from vlskv_ray.config.options import Config, is_section
from vlskv_ray.config.original import rename_original_keys, rename_original_preset
from vlskv_ray.config.problems import in_plain_words


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration; see `load_config_and_notices`, whose notices it drops."""
    return load_config_and_notices(file, overrides)[0]


def load_config_and_notices(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, tuple[str, ...]]:
    """Reads a run's configuration, and tells which keys were understood but mean something else or nothing here.

    Args:
        file: a YAML file in this project's layout or in that of the original project.
        overrides: `section.key=value`, a leading `--` allowed; values are YAML. The last of several wins.

    Returns:
        The configuration, paths absolute and the run named, and one line for each such key.

    Raises:
        ConfigError: holds one line for each problem of the file and of the overrides.
    """
    draft = Draft(str(file))
    draft.read_file()
    rename_original_keys(draft)
    for override in overrides:
        draft.override(override)
    rename_original_preset(draft)

    for name in (name for name, option in Config.model_fields.items() if is_section(option.annotation)):
        if draft.tree.get(name) is None:  # `optimizer:` with nothing below it is an empty section
            draft.tree[name] = {}
    output = draft.tree["output"]
    if isinstance(output, dict) and output.get("name") is None:
        output["name"] = Path(file).stem  # stored: a copy of this configuration under another file name is the same run

    try:
        config = Config.model_validate(draft.tree)
    except ValidationError as error:
        for details in error.errors():
            for key, text in in_plain_words(details):
                draft.problem(key, text)
    if draft.problems:
        lines = [line for _, line in sorted(draft.problems, key=lambda problem: problem[0])]
        raise ConfigError(list(dict.fromkeys(lines)))  # of a list without its values each of them is missing
    return config, tuple(line for _, line in sorted(draft.notices, key=lambda notice: notice[0]))


def dump_config(config: Config) -> str:
    """The complete configuration as YAML that `load_config` reads back to an equal one."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes texts such as "1e-4", which PyYAML takes for text and we for a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
