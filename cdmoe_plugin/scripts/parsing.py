"""The options of a command: from dataclasses and a YAML file, with help in groups."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

CONFIGS = Path(__file__).with_name("configs")
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def help_field(text: str, default: Any = None) -> Any:
    """Make a field of a dataclass with its help; `MISSING` as default makes the option a required one."""
    return field(default=default, metadata={"help": text})


def given_fields(values: object, prefix: str = "") -> dict[str, Any]:
    """Return the fields of `condense_arguments`' dataclass that were set, without their prefix."""
    return {name.removeprefix(prefix): value for name, value in vars(values).items() if value is not None}


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """Return a question about the name that is nearest to an unknown one; nothing if none is near."""
    near = get_close_matches(str(word), names, 1)
    return f"; did you mean {near[0]}?" if near else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show options by one spelling, and defaults, but not None, which means that nothing is given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)


class PlainParser(argparse.ArgumentParser):
    """A parser of a command without dataclasses: with an example on top, without abbreviations.

    It raises a `ValueError` where argparse would end the program, and names the nearest option for an unknown one.

    Args:
        command (`str`): The command, such as "plan show".
        description (`str`): One sentence.
        example (`str`): Command lines, without the leading "cdmoe".
    """

    def __init__(self, command: str, description: str, example: str, **kwargs: Any) -> None:
        lines = "\n".join(f"  cdmoe {line}" for line in example.strip().splitlines())
        super().__init__(
            prog=f"cdmoe {command}",
            description=f"{description}\n\n{lines}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:  # before argparse misses options that are required
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"unknown option {word}{did_you_mean(name, self._option_string_actions)}")
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}")
        return namespace, []

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Parser(HfArgumentParser, PlainParser):
    """A parser that fills dataclasses from the command line and from a YAML file (`--config`).

    Args:
        dataclasses (`Sequence[type]`): As in transformers' `HfArgumentParser`.
        groups (`Mapping[str, Iterable[str]]`): Titles of the help's groups, and the options that belong there.
        ignored (`Iterable[str]`, *optional*): Keys of a YAML file that are options of other commands.
        **kwargs: As in `PlainParser`.
    """

    def __init__(
        self,
        dataclasses: Sequence[type],
        groups: Mapping[str, Iterable[str]],
        ignored: Iterable[str] = (),
        **kwargs: Any,
    ) -> None:
        self._optional: set[str] = set()
        self._ignored = set(ignored)
        self._first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        self._first.error = self.error  # type: ignore[method-assign]
        self._first.add_argument(
            "--config",
            metavar="NAME_OR_FILE",
            help="YAML file with options as keys; options on the command line win. Or the name of one that comes with "
            f"the package: {', '.join(SHIPPED)}.",
        )
        PlainParser.__init__(self, parents=[self._first], usage="%(prog)s [options]", **kwargs)
        self.dataclass_types: list[Any] = list(dataclasses)
        for each in dataclasses:
            hints = get_type_hints(each)
            self._optional |= {name for name, hint in hints.items() if type(None) in get_args(hint)}
            self._add_dataclass_arguments(each)  # type: ignore[arg-type]
        for action in self._actions:
            if isinstance(action, argparse._StoreFalseAction):  # HfArgumentParser repeats the help for "--no_..."
                action.help, action.default = f"The same as --{action.dest} false.", argparse.SUPPRESS
        for title, names in groups.items():
            self._arrange(title, set(names))

    def _arrange(self, title: str, names: set[str]) -> None:
        """Move options to a group of the help."""
        group, rest = self.add_argument_group(title), self._optionals._group_actions
        group._group_actions = [action for action in rest if action.dest in names]
        self._optionals._group_actions = [action for action in rest if action.dest not in names]

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse the command line, and the YAML file that it may name.

        Args:
            args (`Sequence[str]`, *optional*): The program's own arguments by default.

        Returns:
            `tuple`: An instance of every dataclass.

        Raises:
            ValueError: naming the option, or the key of the file, that is unknown or has a wrong value.
        """
        given, rest = self._first.parse_known_args(args)
        if given.config is not None:
            self._read_config(given.config)
        try:
            *parsed, _ = self.parse_args_into_dataclasses(rest, look_for_args_file=False)
        except ValueError as error:
            raise ValueError(str(error)) from error  # TRL's and transformers' own checks are about options, too
        return tuple(parsed)

    def _read_config(self, name: str) -> None:
        """Make the values of a YAML file the options' defaults."""
        path, shipped = Path(name), CONFIGS / f"{name}.yaml"
        if not path.exists() and not shipped.exists():
            raise ValueError(
                f"`--config` {name} is neither a file nor a config of this package{did_you_mean(name, SHIPPED)}"
            )
        path = path if path.exists() else shipped
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"`--config` {path} is no YAML file: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"`--config` {path} should hold options as `name: value`.")
        for action in self._actions:
            if action.dest in values:
                action.default, action.required = values[action.dest], False
        names = {action.dest for action in self._actions} | self._ignored
        for key in values:
            if key not in names:
                raise ValueError(f"`--config` {path} has the key {key!r}, which is no option{did_you_mean(key, names)}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Read "none" as None where an option takes it and it is no text, as TRL's parser does."""
        if action.nargs in ("+", "*") and action.type is not str and "," in arg_string:
            words = " ".join(arg_string.replace(",", " ").split())
            raise argparse.ArgumentError(action, f"values are separated by spaces: {words}, not {arg_string}")
        may_be_none = action.dest in self._optional and action.nargs is None and action.type is not str
        if may_be_none and arg_string.lower() in ("none", "null"):
            return None
        return super()._get_value(action, arg_string)
