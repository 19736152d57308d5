"""Data for real models, made of what package registries ship."""
