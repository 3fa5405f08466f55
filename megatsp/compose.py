"""From YAML groups and command-line overrides to the typed configuration, and to YAML and back.

Hydra composes the groups; keys and values are then held against the schema here, so that every
mistake, in an override or in a file, is named with its full path and the nearest valid one.
There are two primary files: train.yaml, and sft.yaml, whose model is that of finetune.hf.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatsp.nearest import did_you_mean
from megatsp.schema import Config, FinetuneConfig
from megatsp.tuned_model import check_model, model_before_overrides, open_source

EXPERIMENT = "experiment"  # the one group that is no part of the schema: its files set any key

# A group that one of the primary files does not have, and what to say of it there.
_ABSENT = {
    "train": ("finetune", "tunes a Hugging Face checkpoint: that is `megatsp sft`"),
    "sft": ("model", "chooses a model, and `megatsp sft` tunes that of finetune.hf: leave it out"),
}


def config_dir() -> Path:
    """The folder of the YAML groups: inside the package (a wheel), or beside it (a checkout)."""
    package = Path(__file__).resolve().parent
    folders = (package / "configs", package.parent / "configs")
    return next(folder for folder in folders if (folder / "train.yaml").is_file())


def group_choices(user_dir: Path | None = None, primary: str = "train") -> dict[str, list[str]]:
    """The choices of every configuration group of a primary file, those of the user's folder included."""
    roots = [config_dir()] + ([user_dir] if user_dir else [])
    folders = [folder.name for folder in sorted(config_dir().iterdir()) if folder.is_dir()]
    groups = [name for name in folders if name != _ABSENT[primary][0]]
    return {group: sorted(name for root in roots for name in _names(root / group)) for group in groups}


def compose(overrides: list[str], user_dir: Path | None = None, primary: str = "train") -> Config:
    """The configuration that a primary file and the overrides select; not yet validated.

    Args:
        overrides: Hydra's: `group=choice` or `group.key=value`, the last one wins.
        user_dir: a folder with groups of the user's own, such as experiment/mine.yaml.
        primary: train, or sft: then finetune.hf is opened, and `model` is what it says.

    Raises:
        ValueError: unreadable override or file, unknown group, choice or key, value of a wrong type; for
            sft a checkpoint that cannot be tuned, or keys of `model` that contradict it.
    """
    if user_dir:
        _check_user_dir(user_dir)
    overrides = [_with_home(text) for text in overrides]
    choices = group_choices(user_dir, primary)
    parsed = [_parse(text) for text in overrides]
    selections = [
        text for text, item in zip(overrides, parsed, strict=True) if _selects(item, choices, primary)
    ]
    if user_dir:
        location = user_dir.resolve().as_posix().replace("\\", "\\\\").replace('"', '\\"')
        selections.append(f'hydra.searchpath=["file://{location}"]')
    assignments = [item for item in parsed if item.key_or_group not in choices]
    with _composition_errors(primary):
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            selected = hydra_compose(primary, selections)
        OmegaConf.set_struct(selected, False)
        config = _merge(Config(), selected, assignments)
        if primary == "train":
            if config.finetune != FinetuneConfig():
                raise ValueError("finetune.* tunes a Hugging Face checkpoint: use `megatsp sft`")
            return config
        source = open_source(config.finetune.hf)
        before = replace(Config(), model=model_before_overrides(source.model, config.model))
        return check_model(source, _merge(before, selected, assignments))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with keys changed by `group.key=value`; not validated.

    Raises:
        ValueError: unreadable override, a group's choice instead of a key, an unknown key, a value of a wrong
            type.
    """
    parsed = [_parse(_with_home(text)) for text in overrides]
    choices = group_choices()
    for text, item in zip(overrides, parsed, strict=True):
        if _selects(item, choices, "train"):
            raise ValueError(f"{text} chooses a group's file: give the keys themselves, group.key=value")
    with _composition_errors("train"):
        return _merge(config, {}, parsed)


def primary_defaults(primary: str) -> Config:
    """What a primary file gives where nothing else is said; for sft beside the model, which no file gives."""
    with _composition_errors(primary), initialize_config_dir(str(config_dir()), version_base="1.3"):
        selected = hydra_compose(primary)
    OmegaConf.set_struct(selected, False)
    return _merge(Config(), selected, [])


def _merge(defaults: Config, selected: Any, assignments: Sequence[Override]) -> Config:
    """What the files say over the defaults, and what the command line says over both."""
    # The defaults come first, so that ${trainer.seq_length} also finds a key that no file sets.
    tree = OmegaConf.merge(asdict(defaults), selected)
    for item in assignments:
        OmegaConf.update(tree, item.key_or_group, item.value(), merge=True)
    values = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(values, dict)
    return _to_config(values)


@contextmanager
def _composition_errors(primary: str) -> Iterator[None]:
    """Hydra's errors as a user can read them."""
    try:
        yield
    except MissingConfigException as error:
        wanted = Path(error.missing_cfg_file or "")
        near = did_you_mean(wanted.name, error.options or ())
        raise ValueError(f"no configuration file {wanted}{near}\n{error}") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        group, why = _ABSENT[primary]
        if f"Could not override '{group}" in str(error):  # an experiment of the other command
            raise ValueError(f"the experiment overrides /{group}, which {why}") from error
        raise ValueError(f"cannot compose the configuration: {error}") from error


def to_yaml(config: Config) -> str:
    """The configuration as YAML, in the schema's order; `from_yaml` gives it back."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def from_yaml(text: str) -> Config:
    """The configuration that `to_yaml` wrote; builds no objects but numbers, strings and mappings.

    Raises:
        ValueError: not YAML, an unknown key, a value of a wrong type.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"not a configuration in YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("not a configuration: expected a YAML mapping of groups")
    return _to_config(values)


@functools.cache
def key_paths(node: type = Config, path: str = "") -> tuple[str, ...]:
    """The dotted path of every key and of every group of keys."""
    found: list[str] = []
    for name, kind in get_type_hints(node).items():
        found.append(path + name)
        if is_dataclass(kind):
            assert isinstance(kind, type)
            found += key_paths(kind, f"{path}{name}.")
    return tuple(found)


def _names(folder: Path) -> list[str]:
    """The choices in one group's folder; those in subfolders as `folder/name`."""
    return [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]


def _check_user_dir(user_dir: Path) -> None:
    """Hydra ignores what it does not find, and takes the first of two files of one name: refuse both."""
    groups = list(group_choices())
    present = [group for group in groups if _names(user_dir / group)]
    if not present:
        raise ValueError(
            f"--config-dir {user_dir}: no group in it; give e.g. {user_dir}/{EXPERIMENT}/mine.yaml"
        )
    for group in present:
        if twice := sorted({*_names(user_dir / group)} & {*_names(config_dir() / group)}):
            raise ValueError(
                f"--config-dir {user_dir}: {group}/{twice[0]}.yaml exists in megatsp too; rename it"
            )


def _with_home(text: str) -> str:
    """key=~/folder with the home folder, which no shell puts in there."""
    key, _, value = text.partition("=")
    return f"{key}={Path(value).expanduser()}" if value.startswith("~/") else text


def _parse(text: str) -> Override:
    try:
        item = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot read the override {text!r}: {reason}; write group.key=value") from error
    if item.type is OverrideType.DEL or item.package is not None or not item.key_or_group:
        raise ValueError(f"cannot read the override {text!r}: write group=choice or group.key=value")
    if item.is_sweep_override():
        raise ValueError(
            f"the override {text!r} gives several values; give one, or quote the text: key='\"a,b\"'"
        )
    return item


def _selects(item: Override, choices: Mapping[str, list[str]], primary: str) -> bool:
    """Whether an override selects a group's choice, rather than sets a key's value; either must exist."""
    key, (absent, why) = item.key_or_group, _ABSENT[primary]
    if key == absent and isinstance(item.value(), str):
        raise ValueError(f"{key}={item.value()} {why}")
    if key in choices:
        value = item.value()
        if value not in choices[key]:
            allowed = ", ".join(choices[key])
            near = did_you_mean(str(value), choices[key])
            raise ValueError(f"unknown choice {key}={_shown(value)}{near} (choices of {key}: {allowed})")
        return True
    if key not in key_paths():
        raise ValueError(f"unknown key {key}{did_you_mean(key, [*key_paths(), *choices])}")
    return False


def _to_config(values: Mapping[Any, Any]) -> Config:
    errors: list[str] = []
    config = _build(Config, values, "", errors)
    if errors:
        raise ValueError("\n".join(errors))
    assert isinstance(config, Config)
    return config


def _build(kind: type, values: Any, path: str, errors: list[str]) -> Any:
    """`kind` from a mapping; a key that is absent keeps the schema's default."""
    if not isinstance(values, Mapping):
        errors.append(f"{path.rstrip('.')}={_shown(values)}: expected a mapping of keys")
        return kind()
    hints = get_type_hints(kind)
    for name in values:
        if name not in hints:
            errors.append(f"unknown key {path}{name}{did_you_mean(f'{path}{name}', key_paths())}")
    built: dict[str, Any] = {}
    for item in fields(kind):
        if item.name not in values:
            continue
        value, hint = values[item.name], hints[item.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            built[item.name] = _build(hint, value, f"{path}{item.name}.", errors)
        elif hint == list[str] and _is_text_list(value):
            built[item.name] = [str(v) for v in value] if isinstance(value, list) else [value]
        elif hint == list[int] and isinstance(value, list) and all(type(v) is int for v in value):
            built[item.name] = value
        elif type(value) is hint or (hint is float and type(value) is int):
            built[item.name] = hint(value)
        else:
            errors.append(f"{path}{item.name}={_shown(value)}: {_wanted(hint, value)}")
    return kind(**built)


def _is_text_list(value: Any) -> bool:
    """Whether a key of several texts takes it: one text, or a list of texts and numbers."""
    items = value if isinstance(value, list) else [value]
    return isinstance(value, (list, str)) and all(type(i) in (str, int, float) for i in items)


def _wanted(hint: type, value: Any) -> str:
    """What a key of type `hint` takes, given that it got `value`."""
    if hint == list[str]:
        return f"expected text, or a list [a,b,c] of texts and numbers, got {_type_name(value)}"
    if hint == list[int]:
        return f"expected a list [a,b,c] of whole numbers, got {_type_name(value)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    quote = f"; quote it: '\"{_shown(value)}\"'" if hint is str and isinstance(value, (int, float)) else ""
    return f"expected {names[hint]}, got {_type_name(value)}{quote}"


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    """A value as a user writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
