"""What the four commands share: how they show their help, read numbers, print any file's name, and end."""

import argparse
import contextlib
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that tells the defaults, where there is something to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or isinstance(action.default, (bool, list)) and not action.default else super()._get_help_string(action)


def positive(kind: type, or_zero: bool = False, below: float = math.inf) -> Callable[[str], Any]:
    """What argparse shall make of a flag's text: a positive int or float, or zero too, smaller than `below`."""
    def parse(text: str) -> Any:
        if not (0 < (value := kind(text)) < below or or_zero and value == 0):
            raise ValueError
        return value
    parse.__name__ = f"{'non-negative' if or_zero else 'positive'} {kind.__name__}"
    return parse


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Within, where memory does not suffice, which torch calls a RuntimeError, a MemoryError says so in a line for people."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|not enough memory|can't allocate memory|bad_alloc", str(error)):
            raise
        raise MemoryError("not enough memory; shorter recordings, or in training a smaller --batch_size or --sequence_length, take less") from error


@contextlib.contextmanager
def errors_of(name: object) -> Iterator[None]:
    """Within, the lines of ValueError and MemoryError begin with the name of the recording that is worked on, if they do not yet."""
    try:
        with memory_errors():
            yield
    except (ValueError, MemoryError) as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise (MemoryError if isinstance(error, MemoryError) else ValueError)(f"{name}: {error}") from error


def exit_status_of(name: str, work: Callable[[], int], left: str, *bad: type[Exception]) -> int:
    """The exit status of a command's `work`; 1 after an exception of the kinds `bad`, which says what is bad in a line, or where memory does
    not suffice, 130 after Ctrl-C, when `left` says what is left of it, and 141 where who reads its output has closed the pipe, as `head` does.

    What standard output cannot take goes there as an escape: in file names any byte may stand, and not every terminal speaks Unicode.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a notebook it is none, and takes anything
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with memory_errors():
            status = work()
        print(end="", flush=True)  # a closed pipe is noticed here, and not when Python ends
        return status
    except BrokenPipeError:  # an OSError too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which Python flushes once more
        return 141
    except (*bad, MemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {left}", file=sys.stderr)
        return 130
