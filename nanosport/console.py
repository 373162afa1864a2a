"""The commands as `pip install` names them: nanosport-infer is `python infer.py`, nanosport-check
is `python -m data_prep.check`."""

import runpy
import sys
from pathlib import Path

HERE = ("report", "plan", "serve")


def main() -> None:
    """Run the command by whose name this process was started."""
    name = Path(sys.argv[0]).name.removeprefix("nanosport-")
    if name not in ("train", "rl", "eval", "infer"):
        name = f"nanosport.{name}" if name in HERE else f"data_prep.{name}"
    runpy.run_module(name, run_name="__main__", alter_sys=True)
