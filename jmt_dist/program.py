"""What every program shares: `--help` from the option models, exit codes, one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pydantic import BaseModel

from jmt_dist.errors import UserError
from jmt_dist.recipe import field_names

OK, FAILED, USAGE, OMISSIONS = 0, 1, 2, 3


def describe(model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per key: name, default, meaning."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += describe(kind, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        lines.append(f"  {prefix + name:<32} {field.description} [{default}]")
    return lines


def usage(doc: str, models: Sequence[tuple[str, str, type[BaseModel]]]) -> str:
    """The text of `--help`: the program's docstring, then the keys of each (title, prefix, model)."""
    parts = [doc.strip(), "", "Words are key=value; exit code 0: done, 1: failed, 2: wrong usage, 3: done with omissions."]
    for title, prefix, model in models:
        parts += ["", f"{title}:", *describe(model, prefix)]
    return "\n".join(parts)


def run(
    main: Callable[[list[str]], int | None],
    doc: str,
    models: Sequence[tuple[str, str, type[BaseModel]]],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Call `main(words)` and exit: errors a user can cause become one line on stderr, never a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "help") for word in words):
        print(usage(doc, models))
        sys.exit(OK)
    code: int | None
    try:
        code = main(words)
        sys.stdout.flush()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:  # the reader of our output left: nothing more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(OK if code is None else code)


__all__ = ["FAILED", "OK", "OMISSIONS", "USAGE", "describe", "field_names", "run", "usage"]
