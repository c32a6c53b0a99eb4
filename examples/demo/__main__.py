"""Runs the demo: `python -m examples.demo` from the root of the repository; `MODEL=…` for another base model."""

from __future__ import annotations

import sys

from examples.demo.environment import Workspace, prepare


def main() -> int:
    """Exit code 0 if every check passed, else 1."""
    workspace = Workspace.from_environment()
    prepare(workspace)
    from examples.demo.stages import Demo
    from reft_plugins import ReftError

    demo = Demo(workspace)
    try:
        demo.run()
    except Exception as error:
        if not isinstance(error, ReftError):
            demo.report.console.print_exception(max_frames=4)
        demo.report.check("the demo runs to its end", False, f"{type(error).__name__}: {error}")
    return demo.report.finish()


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this module again
    sys.exit(main())
