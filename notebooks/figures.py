"""The README's pictures, of a run's logs and of what the released checkpoint hears: `python notebooks/figures.py RUN [--recording NAME]`.

Writes `learning_curve.png` and `recording.png` into notebooks/figures.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  # after the path
from matplotlib.figure import Figure  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from commands import exit_status_of  # noqa: E402
from dataset import load_split  # noqa: E402
from files import written_whole  # noqa: E402
from model import RELEASED, load_ensemble  # noqa: E402
from transcribe import draw, transcribe  # noqa: E402

MEAN_OF = 20  # one segment's loss is many times another's


def draw_learning_curve(run: Path, path: Path) -> None:
    """Losses and validation F1 over steps, out of the TensorBoard events of a run; training losses are means of MEAN_OF logged ones."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for tag, label in (("train/onset_loss", "onset, training"), ("metric/loss/onset_loss", "onset, validation"),
                       ("train/frame_loss", "frame, training"), ("metric/loss/frame_loss", "frame, validation")):
        steps, losses = np.array([(p.step, p.value) for p in events.Scalars(tag)]).T
        if "train" in tag and len(steps) >= MEAN_OF:
            steps, losses = (np.convolve(values, np.full(MEAN_OF, 1 / MEAN_OF), "valid") for values in (steps, losses))
        left.plot(steps, losses, "o-" if "metric" in tag else "-", label=label, markersize=4)
    left.set(yscale="log", xlabel="step", ylabel="binary cross entropy", title="losses")
    for tag in ("metric/note/f1", "metric/note-with-offsets/f1", "metric/frame/frame_f1"):
        points = events.Scalars(tag)
        right.plot([p.step for p in points], [p.value for p in points], "o-", label=tag.removeprefix("metric/"), markersize=4)
    right.set(xlabel="step", ylabel="F1", ylim=(0, 1), title="validation")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=100)


def run(args: argparse.Namespace) -> int:
    """Draw both; raises OSError and ValueError."""
    out = ROOT / "notebooks" / "figures"
    recordings = load_split(json.loads((args.run / "config.json").read_text(encoding="utf-8"))["data"], "test")
    recording = next((r.until(20) for r in recordings if (args.recording or "") in r.name), None)
    if recording is None:
        raise ValueError(f"{args.run}: none of its {len(recordings)} test recordings is called {args.recording}")
    draw_learning_curve(args.run, out / "learning_curve.png")
    audio = recording.to_float().numpy()
    notes, _, _ = transcribe(load_ensemble(RELEASED), audio)
    draw(out / "recording.png", audio, notes, recording.notes)
    print(f"{out}: learning_curve.png, recording.png ({recording.name}, its first 20 s)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder of train.py")
    parser.add_argument("--recording", help="part of the name of a test recording; by default the first")
    args = parser.parse_args()
    return exit_status_of("figures.py", lambda: run(args), "what is written is whole", OSError, ValueError)


if __name__ == "__main__":
    sys.exit(main())
