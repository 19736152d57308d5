"""One step of training, and what notices that it goes wrong."""
