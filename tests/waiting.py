"""How long tests wait for what may never come."""

HANG_SECONDS = 1800
"""What takes longer hangs: ten times what the longest wait takes on a busy machine. No test measures a speed by it."""
