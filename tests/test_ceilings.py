"""The project stays small: code tokens of the three files, lines of the README.

A code token is a name, an operator, a number or a string. Comments, docstrings and white space are free, so packing
lines more tightly gains nothing; only writing less code does. The ceilings exist because the project is worth reading
only while it is short. If a change does not fit, simplify something else first.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
CEILINGS = {"R1ZeroTrain.py": 7_500, "rewards.py": 2_800, "prompts.py": 2_400}
KINDS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
WITH_DOCSTRING = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def code_tokens(source: str) -> int:
    docstrings = set()  # line numbers of docstrings
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # From Python 3.12 on, the parts of an f-string are tokens too. It counts as one, as before.
        kind = tokenize.tok_name[token.type]
        depth -= kind == "FSTRING_END"
        if depth == 0 and token.start[0] not in docstrings:
            count += token.type in KINDS or kind == "FSTRING_END"
        depth += kind == "FSTRING_START"
    return count


def test_what_is_a_code_token() -> None:
    lines = ['"""One', 'docstring."""', "# a comment", "x = f'{x + 1:{y}} and {z}'", ""]
    assert code_tokens("\n".join(lines)) == 3
    assert code_tokens("def f(a):\n    'Docs.'\n    return a[0] + 1  # why\n") == 6 + 7


def test_code_stays_below_its_ceilings() -> None:
    tokens = {name: code_tokens((ROOT / name).read_text()) for name in CEILINGS}
    assert all(tokens[name] <= CEILINGS[name] for name in tokens), tokens


def test_the_readme_stays_a_front_page_and_names_the_ceilings() -> None:
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 250
    wide = [line for line in lines if len(line) > 120]
    assert all(line.startswith("[") for line in wide)  # an address cannot be wrapped
    assert all(f"{ceiling:,}" in text for ceiling in CEILINGS.values())
