"""What is wrong with a set of images, gathered by kind, so that one pass can list everything."""

from __future__ import annotations

_LISTED_OF_A_KIND = 5


class Problems:
    """Messages by kind, in the order in which the kinds first came up."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, message: str) -> None:
        """Take note of one problem.

        Args:
            kind: What problems like it are called, e.g. "missing image".
            message: Where it is, what it is, and the remedy.
        """
        self._by_kind.setdefault(kind, []).append(message)

    def __len__(self) -> int:
        return sum(map(len, self._by_kind.values()))

    def lines(self) -> list[str]:
        """The first few of every kind, and how many more of it there are."""
        lines = []
        for kind, messages in self._by_kind.items():
            lines += messages[:_LISTED_OF_A_KIND]
            if len(messages) > _LISTED_OF_A_KIND:
                lines.append(f"and {len(messages) - _LISTED_OF_A_KIND} more of the kind: {kind}")
        return lines
