"""SwiftKV for vision-language models, distilled on Ray. Importing registers the SwiftKV model types; nothing else."""

import os
import sys

try:
    os.getcwd()
except FileNotFoundError:  # torch would end this process as it is imported, with a word about a library of its own
    print("the working directory of this command has been deleted; `cd` to one that is there", file=sys.stderr)
    sys.exit(2)

from vlskv_ray.model.registration import register_with_transformers  # noqa: E402 - see above

__version__ = "0.1.0"

register_with_transformers()
