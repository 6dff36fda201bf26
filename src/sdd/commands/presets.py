"""`sdd presets`: the presets and placements, or one of them in full."""

import json

from sdd.commands.configs import base_config, with_placement
from sdd.commands.parser import Parser
from sdd.models.describe import list_presets, show_preset
from sdd.train import config_io


def main(args: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("sdd presets", "List presets and placements, or show one preset.", allow_abbrev=True)
    parser.add_argument("name", metavar="PRESET", nargs="?", help="a preset to show")
    parser.add_argument("--placement", default="sdd", help="the placement to show it with (default sdd)")
    parser.add_argument("--json", action="store_true", help="print the config as JSON")
    options = parser.parse_known(args)
    if options.name is None:
        print(list_presets())
        return 0
    config = with_placement(base_config(options.name), options.placement)
    print(json.dumps(config_io.to_dict(config), indent=2) if options.json else show_preset(options.name, config.model))
    return 0
