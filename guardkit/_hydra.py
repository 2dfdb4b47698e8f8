"""`CONF_DIR` under the name by which scripts outside this project have imported it; the room that knows Hydra is `runs`."""

from guardkit.runs.hydra import CONF_DIR

__all__ = ["CONF_DIR"]
