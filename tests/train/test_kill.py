from dataclasses import replace

import pytest
from helpers_parallel import Forked
from helpers_train import TINY
from kill_run import compare, config, killed_run

from sdd.models import MoEConfig
from sdd.train.trainer import start


def killed(settings, folder, **options):
    """Killed at drawn moments; processes are forked, which takes a fraction of a Python's start."""
    return killed_run(settings, folder, begin=Forked, begins_within=1.0, **options)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_equal_to_one_left_alone(tmp_path):
    """Four kills; a hundred by hand, see kill_run.py."""
    settings = config(steps=60)
    start(settings, tmp_path / "whole").run()
    kills = killed(settings, tmp_path, kills=4, seed=1)
    assert len(kills) == 4
    assert sum(kill.left_half_written for kill in kills) >= 1, "none of them hit a save"
    assert len({kill.step for kill in kills}) > 1, "the run went on in between"
    compare(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_mixture_of_experts_that_is_killed_as_it_saves_ends_bit_equal_too(tmp_path):
    settings = config(steps=40, model=replace(TINY.model, d_ff=24, moe=MoEConfig(4, 2)))
    start(settings, tmp_path / "whole").run()
    (kill,) = killed(settings, tmp_path, kills=1, seed=0)
    assert kill.moment == "saving"
    assert kill.step > 0, "killed before there was anything to lose"
    compare(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_that_is_killed_as_it_saves_beside_the_training_ends_bit_equal_too(tmp_path):
    settings = config(steps=40)
    start(settings, tmp_path / "whole").run()
    kills = killed(replace(settings, checkpoint_async=True), tmp_path, kills=2, seed=0)
    assert kills[0].moment == "saving"
    compare(tmp_path / "whole", tmp_path / "killed")
