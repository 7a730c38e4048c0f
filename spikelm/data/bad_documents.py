"""Documents that cannot be read: left out, counted and listed, up to a limit."""

import warnings
from collections.abc import Sequence
from typing import Any

from spikelm.errors import SpikelmError

LISTED = 3
LONGEST_REASON = 120  # characters; a tokenizer may quote the whole document


class DocumentError(Exception):
    """Why a document cannot be read, and what would be accepted in its place (None where nothing short says it)."""

    def __init__(self, reason: str, accepted: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.accepted = reason, accepted


class BadDocuments:
    """The documents that one reading of the sources `names` leaves out: at most `limit`, one more is a SpikelmError.

    found: {"source": name, "line" (of a file) or "row" (of a Hub dataset): number from 1, "reason"} of each.
    at_once: warn of each as it is met, for a reading whose end may never come; else `warn` tells of all.
    """

    def __init__(self, names: Sequence[str], limit: int = 0, at_once: bool = False) -> None:
        self.names, self.limit, self.at_once = names, limit, at_once
        self.found: list[dict[str, Any]] = []

    def add(self, source: int, number: int, error: DocumentError) -> None:
        """Note document `number` of names[source]. Number 0 is a text, which is one document: always an error."""
        name = self.names[source]
        unit = "row" if name.startswith("hub:") else "line"
        self.found.append({"source": name, unit: number, "reason": error.reason})
        if self.limit == 0 or number == 0:
            place = f"{name} {unit} {number}" if number else name
            accepted = f" is {error.reason}; {error.accepted} is accepted" if error.accepted else f": {error.reason}"
            raise SpikelmError(place + accepted) from error
        if len(self.found) > self.limit:
            raise SpikelmError(
                f"more than max_bad_documents={self.limit} documents cannot be read: {listed(self.found)}"
            ) from error
        if self.at_once:
            warnings.warn(f"skipped a document that cannot be read: {listed(self.found[-1:])}", stacklevel=2)

    def warn(self) -> None:
        """Tell how many documents were left out, and the first of them."""
        if self.found and not self.at_once:
            documents = "1 document" if len(self.found) == 1 else f"{len(self.found)} documents"
            warnings.warn(f"skipped {documents} that cannot be read: {listed(self.found)}", stacklevel=2)

    def of(self, source: int) -> list[dict[str, Any]]:
        """Those of one source."""
        return [document for document in self.found if document["source"] == self.names[source]]


def listed(documents: Sequence[dict[str, Any]]) -> str:
    """The first documents as "FILE line N: reason", and how many more there are."""
    shown = []
    for document in documents[:LISTED]:
        unit = "line" if "line" in document else "row"
        shown.append(f"{document['source']} {unit} {document[unit]}: {document['reason']}")
    more = len(documents) - len(shown)
    return "; ".join([*shown, f"and {more} more"] if more else shown)


def document_error(what: str, error: BaseException) -> DocumentError:
    """`what` fails on a document with `error`, which is raised again where it is not to be laid to the document.

    That is want of memory, and what is no Exception (an interrupt) but for a panic within the tokenizers library.
    """
    of_document = isinstance(error, Exception) and not isinstance(error, MemoryError)
    if not of_document and type(error).__name__ != "PanicException":
        raise error
    words = " ".join(f"{type(error).__name__}: {error}".split())
    shown = words if len(words) <= LONGEST_REASON else words[: LONGEST_REASON - 3] + "..."
    return DocumentError(f"{what} fails on it ({shown})")
