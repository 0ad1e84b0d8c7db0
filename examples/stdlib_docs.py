"""A chat data set made from the documentation inside the running Python's standard library.

Every module, class and function there that has a docstring becomes one `Doc`. A `Doc` gives a
short text (what a language model reads first) and one question with its answer (what a chat
model is tuned on). Sources are read with `ast` and never imported, so nothing of them runs, and
the same Python gives the same list in the same order on every machine.

It does not try to be a good data set: it is real text of some size that every Python carries.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Third-party packages, and trees that exist to test Python or to be edited by its own tools.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_LONGEST_ANSWER = 160  # characters; a first sentence above it is no short answer

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Doc:
    """One documented object, for example `shutil.copytree`, a function of the module `shutil`."""

    name: str
    module: str
    kind: str
    arguments: tuple[str, ...] | None  # None: a module or a class, which this reader does not call
    docstring: str

    def text(self) -> str:
        """The object as running text: its full name, what and where it is, and its docstring."""
        call = "" if self.arguments is None else f"({', '.join(self.arguments)})"
        own_name = self.name.rpartition(".")[2]
        headline = f"`{self.name}`\n{self.kind} {own_name}{call} of the module `{self.module}`"
        return f"{headline}\n\n{self.docstring}\n"


def read_docs(root: Path | None = None) -> list[Doc]:
    """Every docstring below `root` (default: the standard library), in the order of the paths."""
    root = root or Path(sysconfig.get_path("stdlib"))
    docs: list[Doc] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts):
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            docs += _docs_of_file(path, module)
    return docs


def chat_pairs(docs: list[Doc]) -> list[dict]:
    """One question and its answer for each `Doc`, in the `{"messages": [...]}` form.

    The four kinds of question take turns, so that every kind is equally common.
    """
    pairs = []
    for index, doc in enumerate(docs):
        question, answer = _question(doc, index % 4)
        pairs.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return pairs


def _docs_of_file(path: Path, module: str) -> list[Doc]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old sources hold escapes that newer Pythons warn about
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # not Python for this interpreter
            return []
    docs = []
    for name, kind, node in _walk(tree, module, "module"):
        docstring = ast.get_docstring(node)
        if docstring:
            is_call = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            arguments = _argument_names(node.args) if is_call else None
            docs.append(Doc(name, module, kind, arguments, docstring))
    return docs


def _walk(node: _Documented, name: str, kind: str) -> Iterator[tuple[str, str, _Documented]]:
    """Yield `node` and what it defines, outermost first, as (dotted name, kind, node)."""
    yield name, kind, node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, f"{name}.{child.name}", "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = "method" if kind == "class" else "function"
            yield f"{name}.{child.name}", inner, child


def _argument_names(args: ast.arguments) -> tuple[str, ...]:
    names = [a.arg for a in [*args.posonlyargs, *args.args]]
    if args.vararg:
        names.append(f"*{args.vararg.arg}")
    names += [a.arg for a in args.kwonlyargs]
    if args.kwarg:
        names.append(f"**{args.kwarg.arg}")
    return tuple(name for name in names if name not in ("self", "cls"))


def _question(doc: Doc, kind: int) -> tuple[str, str]:
    sentence = _first_sentence(doc.docstring)
    if kind == 0 and len(sentence) <= _LONGEST_ANSWER:
        return f"What does `{doc.name}` do?", sentence
    if kind == 1 and doc.arguments is not None:
        listed = ", ".join(f"`{name}`" for name in doc.arguments)
        return f"Which arguments does `{doc.name}` take?", f"It takes {listed or 'no arguments'}."
    if kind == 2:
        return f"Which module documents `{doc.name}`?", f"The module `{doc.module}`."
    return f"What is `{doc.name}`?", f"It is a {doc.kind}."


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n", 1)[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
