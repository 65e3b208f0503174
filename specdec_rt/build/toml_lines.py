"""Where the keys of a TOML file stand: the standard library's parser does not say."""

import re
import tomllib

__all__ = ["KeyPath", "key_lines"]

KeyPath = tuple[str | int, ...]
"""Keys from the outermost table inwards; a number is an array's element."""

_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})' r"|'''.*?'''(?:'{0,2})" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}\n#]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, where each table, key and array element of `text` first stands.

    `text` is TOML that `tomllib` has read. Elements of arrays of tables are not told apart.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.lines


class _Scanner:
    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._text = text
        self._at = 0

    def document(self) -> None:
        table: KeyPath = ()
        self._skip()
        while self._at < len(self._text):
            if self._peek("["):
                table = self._header()
            else:
                self._pair(table)
            self._skip()

    def _header(self) -> KeyPath:
        while self._peek("["):
            self._at += 1
        table = self._key(())
        while self._peek("]"):
            self._at += 1
        return table

    def _pair(self, table: KeyPath) -> None:
        path = self._key(table)
        self._at += 1  # "="
        self._skip()
        self._value(path)

    def _key(self, table: KeyPath) -> KeyPath:
        """Read a dotted key and what white space follows it; every part of it is noted."""
        path = table
        while True:
            self._skip()
            token = _BARE_KEY.match(self._text, self._at)
            if token is not None:
                part = token.group()
            else:
                token = _STRING.match(self._text, self._at)
                assert token is not None  # the text is valid
                part = tomllib.loads(f"key = {token.group()}")["key"]
            path = (*path, part)
            self._note(path)
            self._at = token.end()
            self._skip()
            if not self._peek("."):
                return path
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        if self._peek("["):
            self._elements(path)
        elif self._peek("{"):
            self._inline_table(path)
        else:
            token = _STRING.match(self._text, self._at) or _SCALAR.match(self._text, self._at)
            assert token is not None
            self._at = token.end()

    def _elements(self, path: KeyPath) -> None:
        self._at += 1
        index = 0
        while not self._closes("]"):
            self._note((*path, index))
            self._value((*path, index))
            index += 1

    def _inline_table(self, path: KeyPath) -> None:
        self._at += 1
        while not self._closes("}"):
            self._pair(path)

    def _closes(self, bracket: str) -> bool:
        """Step over a comma, or over the closing bracket."""
        self._skip()
        if self._peek(","):
            self._at += 1
            self._skip()
        closes = self._peek(bracket)
        self._at += closes
        return closes

    def _note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self._text.count("\n", 0, self._at) + 1)

    def _peek(self, character: str) -> bool:
        return self._text.startswith(character, self._at)

    def _skip(self) -> None:
        gap = _GAP.match(self._text, self._at)
        assert gap is not None
        self._at = gap.end()
