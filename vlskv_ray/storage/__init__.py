"""What a run keeps, so that nothing is lost."""
