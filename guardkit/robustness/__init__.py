"""Attacks and everyday edits, and the two protocols that try them on a guard."""
