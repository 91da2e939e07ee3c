"""Write the tables of `docs/api/*.md`, so that the pages can be read without building the site.

`python tests/api_tables.py` writes them; `tests/test_docs.py` checks that they are up to date.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path

API = Path(__file__).parent.parent / "docs" / "api"


def find(name):
    """Return what a directive `::: name` documents."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(find(parent), attribute)


def list_members(name, value):
    """Yield the value itself and, if it is a module, the code that it exports, each with its name.

    This is what `__all__` lists, or else what the module defines.
    """
    yield name, value
    if not inspect.ismodule(value):
        return
    exported = getattr(value, "__all__", None)
    for key, member in vars(value).items():
        is_own = getattr(member, "__module__", None) == value.__name__
        is_public = is_own and not key.startswith("_") if exported is None else key in exported
        if is_public and (inspect.isfunction(member) or inspect.isclass(member)):
            yield f"{name}.{key}", member


def make_table(page):
    """Make the table of a page: what it documents, in a sentence each, and where it is."""
    rows = ["| name | what it is | defined in |", "|---|---|---|"]
    directives = re.findall(r"(?m)^::: (\S+)$", page)
    pairs = [pair for name in directives for pair in list_members(name, find(name))]
    for name, value in pairs:
        sentence = re.split(r"(?<=\.)(?<!al\.)\s|\n\n", inspect.getdoc(value) or "")[0]
        is_package = inspect.ismodule(value) and hasattr(value, "__path__")
        module = value.__name__ if inspect.ismodule(value) else value.__module__
        path = module.replace(".", "/") + ("/" if is_package else ".py")
        short = name.replace("jchain.", "jc.", 1)
        words = " ".join(sentence.split()).replace("|", "\\|")
        rows.append(f"| `{short}` | {words} | `{path}` |")
    return "\n".join(rows) + "\n"


def update(page):
    """Return the page with its table, which stands before the first directive."""
    text, directives = page.split("\n::: ", 1)
    text = text.split("\n| name |")[0].rstrip("\n") + "\n"
    return f"{text}\n{make_table(page)}\n::: {directives}"


if __name__ == "__main__":
    for path in sorted(API.glob("*.md")):
        path.write_text(update(path.read_text()))
