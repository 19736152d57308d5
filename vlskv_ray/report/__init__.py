"""What a run shows for itself."""
