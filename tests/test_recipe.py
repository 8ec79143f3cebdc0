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
    ("cake", "'cake' is no recipe, choose from default, course"), ("default,icing=1", "'icing' is no entry of a recipe, choose from normalise_mel, "),
    ("default,cosine=2", "cosine is True or False, not '2'"), ("default,cosine", "cosine is True or False, not ''"),
    ("default,transpose=0.5", "transpose is a whole number from 0 on, not '0.5'"), ("default,gain_db=-1", "gain_db is a number from 0 on, not '-1'"),
    ("default,noise=nan", "noise is a number from 0 on, not 'nan'"), ("default,learning_rate=inf", "learning_rate is a number from 0 on, not 'inf'"),
    ("default,combined_unit=0", "combined_unit is a whole number from 1 on, not 0"), ("default,onset_target=soft", "onset_target is one of one, two, not 'soft'")])
def test_what_no_recipe_is_says_why(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_recipe(text)
