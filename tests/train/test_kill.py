import pytest
from kill_run import compare, config, killed_run

from sdd.train import starting


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_equal_to_one_left_alone(tmp_path):
    """Six kills; a hundred by hand, see kill_run.py."""
    settings = config(steps=120)
    starting.start(settings, tmp_path / "whole").run()
    kills = killed_run(settings, tmp_path, kills=6, seed=1)
    assert len(kills) == 6
    assert sum(kill.left_half_written for kill in kills) >= 2, "none of them hit a save"
    assert len({kill.step for kill in kills}) > 1, "the run went on in between"
    compare(tmp_path / "whole", tmp_path / "killed")
