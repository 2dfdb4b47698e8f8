"""A guard in other runtimes."""
