"""Arguments that several tools share."""

import argparse

from fgbg_kd.utils.errors import ConfigError
from fgbg_kd.utils.user_code import import_user_module


class _Import(argparse.Action):
    """Imports each module as soon as it is parsed, before a config is read."""

    def __call__(self, parser, namespace, value, option_string=None):
        try:
            import_user_module(value)
        except ConfigError as error:
            parser.error(str(error))
        modules = [*(getattr(namespace, self.dest) or []), value]
        setattr(namespace, self.dest, modules)


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import MODULE``, which may be repeated; ``args.imports`` lists the modules."""
    parser.add_argument(
        "--import",
        dest="imports",
        action=_Import,
        default=[],
        metavar="MODULE",
        help="a module name or the path of a .py file. It is imported before the config is "
        "read and can register methods, detectors and config keys; repeatable",
    )
