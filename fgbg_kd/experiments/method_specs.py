"""The names of methods on the command line and in tables, such as "PKD WEIGHT=2"."""

from ..config import method_defaults
from ..methods import METHOD_REGISTRY
from ..utils.errors import ConfigError
from .settings import RUN_KEYS, flat, keys_read

PLAIN, TEACHER, FGBG = "plain", "teacher", "FgBg"
# These keys are not options: they choose the method, or all runs of a comparison share them.
_NO_OPTIONS = {
    *RUN_KEYS,
    "MODEL.META_ARCHITECTURE",
    "MODEL.KD.METHOD",
    "MODEL.KD.STUDENT",
    "MODEL.KD.TEACHER.CONFIG",
    "MODEL.KD.TEACHER.WEIGHTS",
    "MODEL.KD.TEACHER.SHA256",
    "DATASETS.TEST",
    "DATASETS.TEST_JSON",
    "DATASETS.TEST_IMAGES",
}


def one_spelling(spec: str) -> str:
    """The spec with one spelling of spaces and numbers, so that a method has one folder.

    Example:
        >>> one_spelling("FGD  WEIGHT=3e-3")
        'FGD WEIGHT=0.003'
    """

    def of_option(text: str) -> str:
        key, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:  # a word, such as False
            return text
        return f"{key}{equals}{int(number) if number.is_integer() else number}"

    return " ".join(map(of_option, spec.split()))


def method_overrides(cfg, spec: str) -> list[str]:
    """The config overrides that train a student with a method.

    Args:
        cfg: a config that distils.
        spec: "plain" or a name in METHOD_REGISTRY, then any number of KEY=VALUE. KEY is an option
            of the method (WEIGHT), a key of MODEL.KD (WARMUP_ITERS) or a full key of the config
            (SOLVER.BASE_LR).

    Returns:
        [key, value, key, value, ...].

    Raises:
        ConfigError: the method does not exist, it does not read the key, or all runs of a
            comparison share the key.

    Example:
        >>> method_overrides(cfg, "PKD WEIGHT=2")[4:]
        ['MODEL.KD.PKD.WEIGHT', '2']
    """
    name, *options = spec.split() or [""]
    if name == PLAIN:
        overrides, prefixes = ["MODEL.META_ARCHITECTURE", cfg.MODEL.KD.STUDENT], [""]
        if cfg.DATASETS.UNLABELED:  # plain training cannot use them
            overrides += ["DATASETS.UNLABELED", "()"]
    elif name in METHOD_REGISTRY:
        overrides = ["MODEL.META_ARCHITECTURE", "FgBgDistiller", "MODEL.KD.METHOD", name]
        prefixes = [_node(name), "MODEL.KD.", ""]
    else:
        names = [PLAIN, *sorted(n for n, _ in METHOD_REGISTRY)]
        raise ConfigError(f"There is no method {name!r}: choose from {', '.join(names)}.")
    chosen = dict(zip(overrides[::2], overrides[1::2]))
    keys = keys_read({**flat(cfg), **chosen}).keys() - _NO_OPTIONS
    for option in options:
        key, equals, value = option.partition("=")
        found = [prefix + key for prefix in prefixes if prefix + key in keys]
        if not equals:
            raise ConfigError(
                f"{spec!r}: {option!r} has no value: write {option}=VALUE, without spaces."
            )
        if not found:
            raise ConfigError(f"{spec!r}: {_no_option(name, key, keys)}")
        overrides += [found[0], value]
    return overrides


def _no_option(name: str, key: str, keys: set[str]) -> str:
    if key in _NO_OPTIONS or f"MODEL.KD.{key}" in _NO_OPTIONS:
        return f"{key} is not an option of a method: compare.py sets it, or all runs share it."
    own = sorted(k.removeprefix(_node(name)) for k in keys if k.startswith(_node(name)))
    read = f"its options are {', '.join(own)}" if own else "it has no options of its own"
    return f"{name} does not read {key}: {read}. Full keys, such as SOLVER.BASE_LR, work too."


def name_of(row: dict) -> str:
    """The name of a row's method in tables.

    It has each option whose value is neither the default nor in the overrides of the comparison. It
    is made from the options of the run, not from the command line. Therefore it stays correct when
    a default changes.

    Args:
        row: a row of results.jsonl (:mod:`.result_rows`).
    """
    name, *typed = row["method"].split()
    if name not in METHOD_REGISTRY:  # plain, the teacher, or a method whose module is not imported
        return row["method"]
    defaults, node = method_defaults(name), _node(name)
    shared = dict(zip(row["overrides"][::2], row["overrides"][1::2]))

    def is_usual(key, value):
        if (text := shared.get(f"{node}{key.upper()}")) is None:
            return value == defaults.get(key)
        return str(value) == text or isinstance(value, float) and float(text) == value

    options = row["options"]
    unusual = [f"{k.upper()}={short(v)}" for k, v in options.items() if not is_usual(k, v)]
    # Keys on the command line that are not options of the method, such as SOLVER.BASE_LR.
    keys = [x.removeprefix(node).removeprefix("MODEL.KD.") for x in typed]
    others = [x for x in keys if x.partition("=")[0].lower() not in options]
    return " ".join([name, *unusual, *others])


def _node(name: str) -> str:
    return f"MODEL.KD.{name.upper()}."


def short(value) -> str:
    """The value of an option as text for a table."""
    return f"{value:g}" if isinstance(value, float) else str(value)
