"""Data and a vision tower for real models, made of what package registries ship."""
