"""What is claimed about speed, as commands that measure both sides in one run. See benchmarks/README.md."""
