"""What the four commands share: how they show their help, and that they can print any file's name."""

import argparse
import io
import sys


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults, where there is something to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or isinstance(action.default, (bool, list)) and not action.default else super()._get_help_string(action)


def print_any_name() -> None:
    """Let what standard output cannot take go there as an escape: in file names any byte may stand, and not every terminal speaks Unicode."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is none, and takes anything
        sys.stdout.reconfigure(errors="backslashreplace")
