"""Names of files and folders that are made from data: plain names everywhere, whatever the data.

Every place that names a file by something that was read, such as a fact's id, asks here.
"""

import hashlib
import re
from collections.abc import Iterable
from urllib.parse import quote

__all__ = ["is_plain", "plain_name", "plain_names"]

SAFE_LENGTH = 100
RESERVED = frozenset(("con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))))
"""Names that Windows keeps for devices, whatever follows a dot."""


def plain_name(text: str) -> str:
    """Turns any text into the name of a file or a folder.

    What is not safe in a name is written as in an address, ``/`` as ``%2F``; so no name leads to another folder, is
    hidden, looks like an option of a command or is one that Windows keeps. A text that is a plain name stays as it is.

    Example:
        >>> plain_name("../up"), plain_name("con"), plain_name("12")
        ('%2E.%2Fup', '%63on', '12')

    Args:
        text: any, of any length.

    Returns:
        ASCII, 1 to 113 characters.
    """
    name = quote(text, safe=" ", errors="surrogatepass")
    name = re.sub(r"^[-. ~]|[. ]$", _escaped, name)
    if _is_reserved(name):
        name = re.sub("^.", _escaped, name)
    return name if 0 < len(name) <= SAFE_LENGTH else _with_sum(name, text)


def plain_names(texts: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Turns texts into names of which no two are the same, even where capitals do not count.

    Args:
        texts: any; a text that comes again has one name.
        taken: names that none may have.

    Returns:
        Text -> name, see `plain_name`.
    """
    names: dict[str, str] = {}
    used = {name.casefold() for name in taken}
    for text in dict.fromkeys(texts):
        name = plain_name(text)
        if name.casefold() in used:
            name = _with_sum(name, text)
        used.add(name.casefold())
        names[text] = name
    return names


def is_plain(name: str) -> bool:
    """Whether something that was read can be a name that was made here."""
    return bool(re.fullmatch(r"[A-Za-z0-9_%~ .-]{1,113}", name)) and not re.search(r"^[-. ~]|[. ]$", name)


def _escaped(found: re.Match[str]) -> str:
    return f"%{ord(found[0]):02X}"


def _is_reserved(name: str) -> bool:
    return name.split(".")[0].rstrip().casefold() in RESERVED


def _with_sum(name: str, text: str) -> str:
    return f"{name[:SAFE_LENGTH] or 'empty'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
