"""What every program shares: `--help` from the option models, exit codes, one-line errors."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from pydantic import BaseModel

from jmt_dist.errors import UserError
from jmt_dist.recipe import field_names

OK, FAILED, USAGE, OMISSIONS = 0, 1, 2, 3
# what a file system refuses, and what helps; any other OSError is taken for a mistake of ours and keeps its traceback
REFUSALS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Look who may read and write there, or name another place."),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, and give the same command."),
    # of flock: Lustre without its option `flock`, say; Linux says no more than "Function not implemented"
    **dict.fromkeys((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP), "File locks are needed: name a place whose file system has them."),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "Name another place."),
}


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
    places = "".join(f" <{name}>" for name in required(models))
    words = f"Words are key=value or --key value{f', or the required ones in their order:{places}' if places else ''}"
    parts = [doc.strip(), "", f"{words}; exit code 0: done, 1: failed, 2: wrong usage, 3: done with omissions."]
    for title, prefix, model in models:
        parts += ["", f"{title}:", *describe(model, prefix)]
    return "\n".join(parts)


def required(models: Sequence[tuple[str, str, type[BaseModel]]]) -> list[str]:
    """Keys of a program's own options that have no default: what bare words stand for, in this order."""
    return [name for name, field in models[0][2].model_fields.items() if field.is_required()] if models else []


def as_pairs(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """`--key value` and `--key=value` as `key=value`; the n-th bare word as the value of the n-th of `names` not given by its key.

    A `--key` with no value after it is `key=true`. Words that fit nowhere stay as they are, for `recipe.parse_word` to refuse.
    """
    pairs: list[str] = []
    bare: list[int] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if re.match(r"--[A-Za-z_]", word):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = left.pop(0) if left and not left[0].startswith("--") else "true"
            pairs.append(f"{key}={value}")
            continue
        if "=" not in word and not word.startswith("-"):
            bare.append(len(pairs))
        pairs.append(word)
    given = {pair.partition("=")[0] for place, pair in enumerate(pairs) if place not in bare}
    for place, name in zip(bare, [name for name in names if name not in given], strict=False):
        pairs[place] = f"{name}={pairs[place]}"
    return pairs


def run(
    main: Callable[[list[str]], int | None],
    doc: str,
    models: Sequence[tuple[str, str, type[BaseModel]]],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Call `main(words)`, all of them key=value, and exit: errors a user can cause become one line on stderr, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or a … that the locale cannot spell must not end hours of work
        sys.stdout.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "help") for word in words):
        print(usage(doc, models))
        sys.exit(OK)
    code: int | None
    try:
        code = main(as_pairs(words, required(models)))
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
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        what = f"{error.filename2 or error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(what.split())}. {REFUSALS[error.errno]}", file=sys.stderr)
        code = FAILED
    sys.exit(OK if code is None else code)


def begin_worker() -> None:
    """What a worker process does first: the program alone answers Ctrl-C, and a worker ends as soon as its program has.

    The workers of a program that was killed would wait for tasks for ever, after they had gone on with those they had, in the files
    of the run that follows.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group
    threading.Thread(target=_end_with_program, daemon=True).start()


def _end_with_program() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        program.join()
        os._exit(FAILED)


__all__ = ["FAILED", "OK", "OMISSIONS", "USAGE", "as_pairs", "begin_worker", "describe", "field_names", "run", "usage"]
