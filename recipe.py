"""Recipes: what the default one does differently from the course's, in its models and in their training."""

import dataclasses
import math
from dataclasses import dataclass

from constants import N_KEYS
from notes import ONSET_PLACES


@dataclass(frozen=True)
class Recipe:
    """What the default recipe does differently from the course's (Hawthorne et al. 2018 as taught in the homework).

    The course's model scores zero for its first thousands of steps: what comes out of two recurrent layers is too faint at
    first to learn from. The linear path past them and biases at the base rates mend that. The first five entries are of the
    model, the rest is how it is trained.
    """

    normalise_mel: bool = True       # batch norm of each mel band over time, as in Kong et al. 2021
    residual: bool = True            # a linear path past a head's recurrent layers, which then learn what it lacks (He et al. 2016)
    base_rate_bias: bool = True      # output biases start at the log-odds of silence
    combined_unit: int = 256         # hidden units in each direction of what joins onsets and frames in `onf`; the course has 88
    dropout: float = 0.0             # share of a frame's features that a ConvStack drops, and half of it after pooling; the course has 0.5
    tune_thresholds: bool = True     # on validation; else 0.5 and 0.5
    cosine: bool = True              # warm-up and cosine to zero; else x 0.98 per 1000 steps
    clip_jointly: bool = True        # one gradient norm for all parameters; else each parameter by itself
    learning_rate: float = 1e-3      # at its peak
    onset_target: str = "two"        # frames that an onset lasts, "one" or "two": see `notes_to_rolls`
    gain_db: float = 12.0            # segments are made softer by up to this many dB; this and the next: see `augment.py`
    equalise_db: float = 6.0         # octave bands are made softer or louder by up to this many dB
    room: float = 0.8                # probability of reverberation in a segment
    noise: float = 0.5               # probability of noise in a segment
    detune: float = 0.05             # segments, once in tune, are heard sharper or flatter by up to this many semitones
    transpose: int = 3               # and moved by up to this many whole ones, with their labels
    offset_weight: float = 3.0       # how often a frame near a note's end counts

    def __post_init__(self) -> None:
        if not self.combined_unit:
            raise ValueError("combined_unit is a whole number from 1 on, not 0")
        if not self.learning_rate:
            raise ValueError("learning_rate is more than 0, or nothing is learnt")
        if round(256 * self.dropout) >= 256:  # in steps of which Dropout counts
            raise ValueError(f"dropout is a share below 0.998, or nothing is left, not {self.dropout:g}")
        if self.transpose >= N_KEYS:
            raise ValueError(f"transpose is fewer semitones than there are keys, {N_KEYS}, not {self.transpose}")
        for name in ("room", "noise"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a probability, 1 at most, not {getattr(self, name):g}")
        if self.onset_target not in ONSET_PLACES:
            raise ValueError(f"onset_target is one of {', '.join(ONSET_PLACES)}, not {self.onset_target!r}")


RECIPES = {"default": Recipe(), "course": Recipe(
    normalise_mel=False, residual=False, base_rate_bias=False, combined_unit=88, dropout=0.5, tune_thresholds=False, cosine=False,
    clip_jointly=False, learning_rate=6e-4, onset_target="one", gain_db=0.0, equalise_db=0.0, room=0.0, noise=0.0, detune=0.0, transpose=0,
    offset_weight=1.0)}


def parse_recipe(text: str) -> Recipe:
    """`NAME[,ENTRY=VALUE...]`: a recipe of RECIPES, some of its entries replaced; `default,cosine=False,gain_db=6`.

    Raises:
        ValueError: there is no such recipe or entry, or the value is none of the entry's type; numbers are finite and not negative.
    """
    name, *changes = text.split(",")
    if name not in RECIPES:
        raise ValueError(f"{name!r} is no recipe, choose from {', '.join(RECIPES)}")
    kinds, values = {field.name: field.type for field in dataclasses.fields(Recipe)}, {}
    for change in changes:
        entry, _, value = change.partition("=")
        if entry not in kinds:
            raise ValueError(f"{entry!r} is no entry of a recipe, choose from {', '.join(kinds)}")
        try:
            values[entry] = {"True": True, "False": False, "1": True, "0": False}[value] if kinds[entry] is bool else kinds[entry](value)
            if isinstance(values[entry], (int, float)) and not 0 <= values[entry] < math.inf:
                raise ValueError
        except (KeyError, ValueError):
            wanted = {bool: "True or False", int: "a whole number from 0 on", float: "a number from 0 on"}[kinds[entry]]
            raise ValueError(f"{entry} is {wanted}, not {value!r}") from None
    return dataclasses.replace(RECIPES[name], **values)
