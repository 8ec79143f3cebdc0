"""Recipes as they are typed."""

import dataclasses
import re

import pytest

from recipe import Recipe, parse_recipe


def test_every_entry_of_a_recipe_can_be_written():
    """All of one recipe's entries, replaced by another's, make the other."""
    entries = ",".join(f"{name}={value}" for name, value in dataclasses.asdict(Recipe()).items())
    assert parse_recipe(f"course,{entries}") == Recipe() != parse_recipe("course")
    assert parse_recipe("default,cosine=0") == parse_recipe("default,cosine=1,cosine=False") == dataclasses.replace(Recipe(), cosine=False)


@pytest.mark.parametrize("text, message", [
    ("cake", "'cake' is no recipe, choose from default, course"), ("cosine=True", "'cosine=True' is no recipe"), ("", "'' is no recipe"),
    ("default,cosin=True", "'cosin' is no entry of a recipe, choose from normalise_mel, "), ("default,", "'' is no entry"),
    ("default,onset_target=three", "onset_target is one of one, two, not 'three'"),
    ("default,transpose=1.5", "transpose is a whole number from 0 on, not '1.5'"),
    ("default,learning_rate=0", "learning_rate is more than 0"), ("default,room=80", "room is a probability, 1 at most, not 80"),
    ("default,noise=1.5", "noise is a probability, 1 at most, not 1.5"), ("default,dropout=0.999", "dropout is a share below 0.998, or nothing is left, not 0.999"),
    ("default,transpose=88", "transpose is fewer semitones than there are keys, 88, not 88"),
    ("default,combined_unit=0", "combined_unit is a whole number from 1 on, not 0"),
    ("default,cosine=yes", "cosine is True or False, not 'yes'"), ("default,cosine", "cosine is True or False, not ''"),
    ("default,gain_db=loud", "gain_db is a number from 0 on, not 'loud'"), ("default,gain_db=-1", "gain_db is a number from 0 on, not '-1'"),
    ("default,gain_db=nan", "gain_db is a number from 0 on, not 'nan'"), ("default,gain_db=inf", "gain_db is a number from 0 on, not 'inf'")])
def test_what_no_recipe_is_says_why(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_recipe(text)
