"""Average checkpoints of one run, or of it and what it began with: `python runs/released/average.py A.pt B.pt … OUT.pt --data FOLDER …`.

After Izmailov et al., UAI 2018: what the last checkpoints of a run agree on holds better elsewhere than any one of them, and
costs nothing. Their batch norms' statistics are averaged like weights. The thresholds are tuned anew on the data's validation split, in full, and how velocities
are read is learnt anew from its training split; all else the checkpoint says is of the last one named.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import load_split  # noqa: E402  # after the path
from devices import keep_pages  # noqa: E402
from model import model_of, read_checkpoint, write_state  # noqa: E402
from train import REPORTED, validate  # noqa: E402

SAME = ("model", "sizes", "recipe")  # in all of them


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of the same model, sizes and recipe")
    parser.add_argument("out", type=Path, help="checkpoint to write, a new one, which evaluate.py can --share")
    parser.add_argument("--data", nargs="+", required=True, help="folders, some with a training and some with a validation split")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out}: is there already; the last file named is the one to write")
        states = [read_checkpoint(path) for path in args.checkpoints]
        for path, state in zip(args.checkpoints, states):
            if any(state[name] != states[-1][name] for name in SAME) or state["weights"].keys() != states[-1]["weights"].keys():
                raise ValueError(f"{path}: differs from {args.checkpoints[-1]} in its {', '.join(SAME)} or layers")
        weights = {name: sum(state["weights"][name] for state in states) / len(states) if last.is_floating_point() else last
                   for name, last in states[-1]["weights"].items()}
        mean = {name: value for name, value in states[-1].items() if name not in ("optimizer", "scheduler")} | {"weights": weights}
        model = model_of(mean, args.checkpoints[-1])
        keep_pages()
        scores = validate(model, load_split(args.data, "validation"), load_split(args.data, "train"))
        print("\n".join(f"{name:30}: {scores[name]:.4f}" for name in REPORTED))
        write_state(args.out, mean | {"thresholds": model.thresholds, "weights": model.state_dict()})
    except (OSError, ValueError) as error:
        print(f"average.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
