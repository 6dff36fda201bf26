"""`sdd presets`: the presets and placements, or one of them in full."""

import json
from typing import Any

from sdd.commands.configs import base_config, with_placement
from sdd.commands.parser import Parser
from sdd.models import model_presets
from sdd.models.describe import list_presets, show_preset
from sdd.train import config_io


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd presets", "List presets and placements, or show one preset.", allow_abbrev=True)
    parser.add_argument("name", metavar="PRESET", nargs="?", help="a preset to show")
    parser.add_argument("--placement", default="sdd", help="the placement to show it with (default sdd)")
    parser.add_argument("--json", action="store_true", help="print the config as JSON; without PRESET, of every preset")
    options = parser.parse_known(args)
    names = list(model_presets) if options.name is None else [options.name]
    configs = {name: with_placement(base_config(name), options.placement) for name in names}
    if options.json:
        values: dict[str, Any] = {name: config_io.to_dict(config) for name, config in configs.items()}
        print(json.dumps(values if options.name is None else values[options.name], indent=2))
    elif options.name is None:
        print(list_presets())
    else:
        print(show_preset(options.name, configs[options.name].model))
    return 0
