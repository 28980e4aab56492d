"""The program in what a model has written, after EvalPlus' sanitizer (evalplus/sanitize.py, from April 2024 on).

EvalPlus parses with tree-sitter, this file with Python's own ast, and only spans of lines that parse are ever kept, so
that the two see the same code.
"""

import ast
import warnings


def sanitize(text: str, entry_point: str) -> str:
    """The imports of `text` and the definitions that `entry_point` needs; all of its code if none is left.

    Quirks, kept: of several definitions of a name the first counts; a function without a return is none, nor is one
    with a decorator; code outside of definitions is dropped.
    """
    code = longest_code(text)
    tree = parse(code)
    if tree is None:
        return code
    imports, definitions = [], {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif (name := defines(node)) is not None:
            definitions.setdefault(name, node)
    needed, todo = set(), [entry_point]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += names_in(definitions[name]) if name in definitions else ()
    kept = imports + [node for name, node in definitions.items() if name in needed]
    return "\n".join(ast.get_source_segment(code, node) for node in kept) or code


def longest_code(text: str) -> str:
    """The span of lines that is valid Python and has most lines that are not blank; the first of several."""
    lines = text.split("\n")
    full = [i for i, line in enumerate(lines) if line.strip()]
    # From the longest span down, so that nearly clean texts, the common case, are parsed a few times.
    for length in range(len(full), 0, -1):
        for first in range(len(full) - length + 1):
            span = "\n".join(lines[full[first] : full[first + length - 1] + 1])
            if parse(span) is not None:
                return span
    return ""


def parse(code: str) -> ast.Module | None:
    """The syntax tree, or None for what is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last three: null bytes, too deep
        return None


def defines(node: ast.stmt) -> str | None:
    """The name that a statement of the top level defines, if it is one that is kept."""
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        return node.name
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
        return node.name if any(isinstance(n, ast.Return) for n in ast.walk(node)) else None
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) and not isinstance(node, ast.For | ast.AsyncFor) else None


def names_in(node: ast.AST) -> set[str]:
    """All identifiers in a piece of code, attributes and arguments too."""
    found = set()
    for n in ast.walk(node):
        found |= {v for field in ("id", "attr", "arg", "name") if isinstance(v := getattr(n, field, None), str)}
    return found
