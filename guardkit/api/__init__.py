"""The work of each command as one function of Python: plain values and objects in, results out. Knows no configuration."""
