"""Make `harmonic` wider: `python runs/released/widen.py narrow.pt wide.pt`. The wide model says what the narrow one said.

After Net2Net (Chen, Goodfellow & Shlens, ICLR 2016): training goes on with more channels and LSTM units. These begin at random,
and what was there before does not hear them, for those weights are zero, until training makes use of them.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import Sizes, build_model, model_of, read_checkpoint, write_state  # noqa: E402  # after the path

BLOCKS = {"lstm": (4, 1), "fc": (1, 2)}  # rows of an LSTM's weights belong to its four gates, columns of the next layer's to its directions


def places(narrow: int, wide: int, blocks: int) -> Tensor:
    """(narrow,) indices of the leading part of each block among `wide`."""
    index = torch.arange(narrow)
    return index // (narrow // blocks) * (wide // blocks) + index % (narrow // blocks)


def widened(name: str, narrow: Tensor, wide: Tensor) -> Tensor:
    """A layer's new weights, (R, C, …) or (R,): `wide` but for the rows that were there before, which are `narrow`, then zeros."""
    blocks = BLOCKS.get(name.split(".")[0], (1, 1))
    index = [places(*sizes, count) for *sizes, count in zip(narrow.shape, wide.shape, blocks)]
    if not index:
        return narrow
    wide = wide.clone()
    wide[index[0]] = 0
    wide[index[0] if len(index) == 1 else (index[0][:, None], index[1])] = narrow.to(wide.dtype)
    return wide


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("narrow", type=Path, help="checkpoint")
    parser.add_argument("wide", type=Path, help="checkpoint to write, for train.py --weights")
    args = parser.parse_args(argv)
    try:
        state = read_checkpoint(args.narrow)
        if state["model"] != "harmonic":
            raise ValueError(f"{args.narrow}: holds a {state['model']!r} model, not a 'harmonic' one")
        torch.manual_seed(0)
        own = build_model("harmonic").state_dict()
        weights = {name: widened(name, value, own.get(name, value)) for name, value in state["weights"].items()}
        wide = {name: value for name, value in state.items() if name not in ("optimizer", "scheduler")}
        wide |= {"sizes": dataclasses.asdict(Sizes()), "weights": weights}
        model_of(wide, args.narrow)  # which says what does not fit
        write_state(args.wide, wide)
    except (OSError, ValueError, IndexError) as error:
        print(f"widen.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
