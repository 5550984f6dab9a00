"""Makes the options of a command from the fields of a settings class, and holds the settings that sweeps share."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal

import typer
import typer.core
import typer.main

from unmask.errors import ConfigError
from unmask.lab.training.fields import setting, settings_of

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", tuple: "TEXT,TEXT"}


class SettingsCommand(typer.core.TyperCommand):
    """A command that has one option for each field of a settings class, and then the options of its function.

    ``settings`` names the module and the settings class, a dataclass whose fields have a help text. It is imported when the
    options are needed, so that ``unmask --help`` does not wait for it. The command's function finds the options that were
    typed in ``context.obj``, as texts (booleans for flags); `unmask.lab.training.fields.converted` reads them.
    """

    settings: tuple[str, str]
    _made: tuple[str, ...] = ()

    def get_params(self, ctx: Any) -> list[Any]:
        """Returns the command's parameters, those of the settings among them."""
        if self._made:
            return super().get_params(ctx)
        module, class_name = self.settings
        known = settings_of(getattr(import_module(module), class_name))
        self._made, parameters = tuple(known), []
        for each in known.values():
            flag, name = bool in each.types, each.name.replace("_", "-")
            # Without a default the help text says what happens without the option.
            without = each.default in (dataclasses.MISSING, None, ())
            option = typer.Option(
                f"--{name}/--no-{name}" if flag else f"--{name}",
                metavar=None if flag else "|".join([*(_METAVARS[one] for one in each.types), *each.words]),
                help=each.help + ("" if without else f" [default: {plain(each.default)}]"),
                show_default=False,
            )
            kind: Any = Annotated[bool | None, option] if flag else Annotated[str | None, option]
            form = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(each.name, form, default=None, annotation=kind))

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


@dataclass(frozen=True)
class SweepOptions:
    """The options that ``unmask sweep`` and ``unmask reproduce`` share, with their help texts."""

    data_dir: str | None = setting(None, "The folder with the tasks' files; without it they come from the hub.")
    workers: int = setting(1, "The number of worker processes; several can share a GPU.")
    threads: int | None = setting(None, "CPU threads of each worker; without it the cores are shared out.")
    devices: tuple[str, ...] = setting((), "The GPUs for the workers in turn, as CUDA numbers: 0,1.")
    engine: Literal["local", "ray"] = setting("local", "local: on this machine; ray: on a Ray cluster (extra ray).")
    dry_run: bool = setting(False, "List the runs in order, and run nothing.")
    retry_failed: bool = setting(False, "Do failed runs again.")

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}; it must be 1 or more.")


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
