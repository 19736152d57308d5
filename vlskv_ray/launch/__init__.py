"""From a config to running workers."""
