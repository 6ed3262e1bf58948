"""The documentation inside Python sources: docstrings under the signatures they explain, and blocks of comments."""

import ast
import inspect
import re
import warnings

#: Whole-line comments that follow each other.
COMMENTS = re.compile(r"(?:^[ \t]*#.*\n)+", re.MULTILINE)
#: Shorter pieces are labels, not prose.
SHORTEST = 60


def prose(source: str) -> str:
    """Docstrings and comment blocks of a module in the order of the source, apart by blank lines; code left out."""
    with warnings.catch_warnings():
        # Old sources have escapes that newer Pythons warn about.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ""
    pieces = [piece for node in ast.walk(tree) if (piece := _docstring(node)) is not None]
    for match in COMMENTS.finditer(source):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line) for line in match.group().splitlines()]
        pieces.append((source.count("\n", 0, match.start()) + 1, "\n".join(lines)))
    return "\n\n".join(text for _, text in sorted(pieces) if len(text) > SHORTEST)


def _docstring(node: ast.AST) -> tuple[int, str] | None:
    """Line and text of a docstring; below a signature it is indented by three, as the help topics are."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    text = ast.get_docstring(node, clean=False)
    if text is None:
        return None
    text = inspect.cleandoc(text)
    line = node.body[0].lineno
    if isinstance(node, ast.Module):
        return line, text
    head = f"class {node.name}" if isinstance(node, ast.ClassDef) else f"{node.name}({ast.unparse(node.args)})"
    return line, head + "\n\n" + "\n".join(f"   {row}" if row else row for row in text.split("\n"))
