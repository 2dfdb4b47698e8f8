"""All commands under one name: guardkit NAME key=value ..., the same as python -m guardkit.NAME key=value ..."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from guardkit import __version__
from guardkit.terminal import complain, forgiving_streams

COMMANDS = {
    "train": "trains one guard",
    "finetune": "trains a LoRA guard inside a vision-language model",
    "sweep": "the sample-efficiency experiment",
    "synthesize": "makes a pair dataset",
    "embed": "embeds images once",
    "fetch": "fetches an encoder once, into a folder that needs no network",
    "evaluate": "measures guards and published classifiers side by side",
    "calibrate": "sets a guard's thresholds with a promise",
    "moderate": "decides over a folder, shards or Parquet files of images",
    "compare": "an old and a new guard on the same images",
    "export": "writes a guard as ONNX for other runtimes",
    "serve": "a guard as a web service",
    "app": "a local web page: judge pairs, or try a guard and review its queue",
}
USER_ERROR = 2


def main() -> None:
    """Runs the command that the first argument names, or lists all."""
    forgiving_streams()
    name, *rest = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(f"guardkit {__version__}")
    elif name in ("--help", "-h"):
        print("guardkit NAME key=value ..., where NAME is one of\n")
        print("\n".join(f"  {command:<11} {what}" for command, what in COMMANDS.items()))
        print("\nguardkit NAME --help lists the settings of a command; python -m guardkit NAME does the same as guardkit NAME")
    elif name in COMMANDS:
        sys.argv = [f"guardkit {name}", *rest]
        getattr(import_module(f"guardkit.{name}"), name)()
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        complain(f"error: there is no command {name!r}{hint}; there are {', '.join(COMMANDS)}")
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
