"""Tests the value that a run gives to its task."""

from __future__ import annotations

from dataclasses import fields

from unmask.lab.tasks.protocol import Source
from unmask.lab.training.config import TrainConfig


def test_a_source_has_the_settings_of_the_run_and_their_defaults():
    config = TrainConfig(model="m", output="o", task="rte", budget="1%")
    assert Source.of(config) == Source(model="m", output="o", task="rte")
    values = {"seed": 3, "max_length": 64, "test_sets": ("svamp",), "data_dir": "glue"}
    changed = TrainConfig(model="m", output="o", task="rte", budget="1%", **values)
    assert {name: getattr(Source.of(changed), name) for name in values} == values


def test_every_attribute_of_a_source_is_a_setting():
    assert {each.name for each in fields(Source)} <= {each.name for each in fields(TrainConfig)}
