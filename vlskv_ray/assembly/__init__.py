"""A text model and a vision tower made into one vision-language model."""
