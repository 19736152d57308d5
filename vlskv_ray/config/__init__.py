"""A run's configuration: its options (`options`), and how a file and overrides become them (`load`)."""

from vlskv_ray.config.draft import ConfigError
from vlskv_ray.config.load import dump_config, load_config, load_config_and_notices
from vlskv_ray.config.options import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    SchedulerConfig,
    SourceConfig,
    TuneConfig,
    changed,
    changed_keys,
    source_from_text,
)

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "SchedulerConfig",
    "SourceConfig",
    "TuneConfig",
    "changed",
    "changed_keys",
    "dump_config",
    "load_config",
    "load_config_and_notices",
    "source_from_text",
]
