"""Makes the options of a command from the fields of a settings class."""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "TEXT,TEXT"}


class SettingsCommand(typer.core.TyperCommand):
    """A command that has one option for each field of a settings class, and then the options of its function.

    The settings class is imported when the options are needed, so that ``unmask --help`` does not wait for it. The command's
    function finds the options that were typed in ``context.obj``, as texts (booleans for flags);
    `unmask.lab.training.fields.converted` reads them.

    Attributes:
        settings: The module and the name of the settings class, a dataclass whose fields have a help text.
    """

    settings: tuple[str, str]
    _made: tuple[str, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        """Returns the command's parameters, those of the settings among them."""
        if self._made:
            return super().get_params(ctx)
        from unmask.lab.training.fields import settings_of

        module, name = self.settings
        known = settings_of(getattr(import_module(module), name))
        self._made, parameters = tuple(known), []
        for setting in known.values():
            flag, option_name = bool in setting.types, setting.name.replace("_", "-")
            # Without a default the help text says what happens without the option.
            without = setting.default in (dataclasses.MISSING, None, ())
            option = typer.Option(
                f"--{option_name}/--no-{option_name}" if flag else f"--{option_name}",
                metavar=None if flag else "|".join([*(_METAVARS[one] for one in setting.types), *setting.words]),
                help=setting.help + ("" if without else f" [default: {plain(setting.default)}]"),
                show_default=False,
            )
            kind: Any = Annotated[bool | None, option] if flag else Annotated[str | None, option]
            form = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(setting.name, form, default=None, annotation=kind))

        # typer makes options from a function's signature; this function's parameters are the settings.
        def carrier() -> None: ...

        carrier.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        carrier.__annotations__ = {p.name: p.annotation for p in parameters}
        app = typer.Typer(add_completion=False)
        app.command()(carrier)
        self.params = [*typer.main.get_command(app).params, *self.params]
        return super().get_params(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command's function, with the options of the settings in ``ctx.obj``."""
        given = {name: ctx.params.pop(name) for name in self._made}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        return super().invoke(ctx)


def plain(value: Any) -> str:
    """Returns a setting's value as it is typed on the command line.

    Example:
        >>> plain(("a", "b")), plain(16.0), plain(False), plain(None)
        ('a,b', '16', 'no', 'none')
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
