"""Trials over a space of options, and what they show."""
