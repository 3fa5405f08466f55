"""Mutants: small faults, each named by the function that it is in and what that then does.

A mutant is found by its function's qualified name, in whichever file that is, and by a text in it that occurs
once. Whitespace, comments and trailing commas do not count, so that neither a reformatting nor a move of the
file loses it.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
PACKAGES = (("megatsp", ""), ("megatsp_kernels", "kernels"))  # a package, and the folder that it lies in
_TOKEN = re.compile(
    r"""
    (?P<comment> \#[^\n]* )
    | (?P<string> (?i:[rbuf]{0,2})
        (?: \"{3}.*?\"{3} | '{3}.*?'{3} | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' ) )
    | (?P<word> \w+ )
    | (?P<sign> [^\w\s] )
    """,
    re.VERBOSE | re.DOTALL,
)


class DoesNotApply(ValueError):
    """A mutant whose function or text is not there, or is there more than once."""


@dataclass(frozen=True)
class Mutant:
    """One fault: in `function`, `find` becomes `replace`.

    name: the function and the effect. kind: of docs/testing.md's list. seen_by: the functions whose tests
    should see it, where the function itself can carry no probe: a Triton kernel.
    """

    area: str
    name: str
    kind: str
    find: str
    replace: str
    seen_by: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        return self.name.partition(":")[0]

    @property
    def change(self) -> list[str]:
        """What a result is of: it is judged again once this differs."""
        return [self.find, self.replace]


@dataclass(frozen=True)
class Function:
    """A function in a tree: its file, its module as Python names it, and its text, parsed."""

    path: Path
    module: str
    qualname: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def is_kernel(self) -> bool:
        """Whether Triton compiles it: it can carry no probe then."""
        return any("jit" in ast.unparse(decorator) for decorator in self.node.decorator_list)


def load_mutants(path: Path = HERE / "mutants.yaml") -> list[Mutant]:
    """Those of the table, in its order."""
    content = yaml.safe_load(path.read_text())
    return [
        Mutant(area, **{**entry, "seen_by": tuple(entry.get("seen_by", ()))})
        for area, entries in content.items()
        for entry in entries
    ]


class Tree:
    """The functions of a checkout, or of a copy of one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._functions: defaultdict[str, list[Function]] = defaultdict(list)
        for package, folder in PACKAGES:
            base = root / folder
            for path in sorted((base / package).rglob("*.py")):
                if not path.is_symlink():
                    module = ".".join(path.relative_to(base).with_suffix("").parts)
                    for qualname, node in _functions(ast.parse(path.read_text()), ()):
                        self._functions[qualname].append(Function(path, module, qualname, node))

    def named(self, qualname: str) -> list[Function]:
        """All functions of this name.

        Raises:
            DoesNotApply: there is none.
        """
        if not (found := self._functions.get(qualname)):
            raise DoesNotApply(f"no function is called {qualname}")
        return found

    def place(self, mutant: Mutant) -> tuple[Function, int, int]:
        """The function of a mutant, and where in its file the text begins and ends.

        Raises:
            DoesNotApply: the text is not there, or more than once.
        """
        try:
            found = [
                (function, *span)
                for function in self.named(mutant.function)
                for span in occurrences(function, mutant.find)
            ]
        except DoesNotApply as error:
            raise DoesNotApply(f"{mutant.name}: {error}") from None
        if len(found) != 1:
            raise DoesNotApply(f"{mutant.name}: found {len(found)} times, not once: {mutant.find}")
        return found[0]

    def mutated(self, mutant: Mutant) -> tuple[Path, str]:
        """The file of a mutant, and its text with the fault.

        Raises:
            DoesNotApply: it cannot be placed, changes nothing, or leaves no Python.
        """
        function, begin, end = self.place(mutant)
        text = function.path.read_text()
        indent = re.match(r"[ ]*", text[text.rfind("\n", 0, begin) + 1 :])
        assert indent is not None
        changed = text[:begin] + mutant.replace.replace("\n", "\n" + indent[0]) + text[end:]
        if _words(mutant.find) == _words(mutant.replace):
            raise DoesNotApply(f"{mutant.name}: it changes nothing")
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise DoesNotApply(f"{mutant.name}: what it leaves is no Python: {error}") from None
        return function.path, changed

    def probed(self, mutant: Mutant) -> list[Function]:
        """The functions that a test must enter to see a mutant.

        Raises:
            DoesNotApply: there is none, or it is a kernel's and no other is named.
        """
        if mutant.seen_by:
            return [function for name in mutant.seen_by for function in self.named(name)]
        function, _, _ = self.place(mutant)
        if function.is_kernel:
            raise DoesNotApply(f"{mutant.name}: a kernel carries no probe: name those that start it, seen_by")
        return [function]


def occurrences(function: Function, text: str) -> Iterator[tuple[int, int]]:
    """Where in the function's file the tokens of `text` are: first and last character."""
    whole = function.path.read_text()
    lines = whole.splitlines(keepends=True)
    begin = sum(map(len, lines[: function.node.lineno - 1]))
    end = sum(map(len, lines[: function.node.end_lineno]))
    there, wanted = list(_tokens(whole[begin:end])), [word for word, _, _ in _tokens(text)]
    for i in range(len(there) - len(wanted) + 1):
        if [word for word, _, _ in there[i : i + len(wanted)]] == wanted:
            yield begin + there[i][1], begin + there[i + len(wanted) - 1][2]


def _tokens(text: str) -> Iterator[tuple[str, int, int]]:
    """Words, signs and strings, with their places; without comments and trailing commas."""
    found = [match for match in _TOKEN.finditer(text) if match.lastgroup != "comment"]
    for i, match in enumerate(found):
        if match[0] != "," or i + 1 == len(found) or found[i + 1][0] not in ")]}":
            yield match[0], match.start(), match.end()


def _words(text: str) -> list[str]:
    return [word for word, _, _ in _tokens(text)]


def _functions(
    node: ast.AST, owners: tuple[str, ...]
) -> Iterable[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = (*owners, child.name) if isinstance(child, (ast.ClassDef, ast.FunctionDef)) else owners
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ".".join(name), child
        yield from _functions(child, name)
