"""SwiftKV for vision-language models, distilled on Ray. Importing registers the SwiftKV model types; nothing else."""

from vlskv_ray.model import swiftkv as swiftkv

__version__ = "0.1.0"
