"""What the four commands share: how they show their help, print any file's name, and end when nobody wants them to go on."""

import argparse
import io
import os
import sys
from collections.abc import Callable


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults, where there is something to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or isinstance(action.default, (bool, list)) and not action.default else super()._get_help_string(action)


def exit_status_of(name: str, work: Callable[[], int], left: str) -> int:
    """The exit status of a command's `work`; 130 after Ctrl-C, when `left` says what is left of it, and 141 where who reads its
    output has closed the pipe, as `head` does.

    What standard output cannot take goes there as an escape: in file names any byte may stand, and not every terminal speaks Unicode.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is none, and takes anything
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = work()
        print(end="", flush=True)  # a closed pipe is noticed here, and not when Python ends
        return status
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {left}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more
        return 141
