"""Manifest: what a store holds, as JSON that people can read and that shows when it was changed by hand.

    {
      "format_version": 3,
      "fingerprint": {"model": "gpt2-xl", "weights": "9f2c...", "config": {"n_layer": 48, ...}, "sigma": 0.135, ...},
      "facts": {"name": "known_1000", "n_facts": 1209, "bad_rows": [], "ids": ["0", "1", ...]},
      "checksum": "..."
    }

The fingerprint is all that changes a run's numbers; what it has under `NOTED`, names and versions, is not compared.
``facts`` says what the run was asked for by its last start. The checksum is the SHA-256 of all the rest. A store of
format version 1 knew its model by name and by a sample of its weights, one of version 2 has no metric but prob: they
can be read, and not be gone on with.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttrace.errors import StoreError
from fasttrace.files.received import NONSENSE, expect, parsed, read_regular, why
from fasttrace.files.writing import atomic_write, write_new

__all__ = [
    "STORE_VERSION",
    "check_fingerprint",
    "compared",
    "differences",
    "join_manifest",
    "read_manifest",
    "write_manifest",
]

STORE_VERSION = 3
VERSIONS = "versions"
NOTED = ("model", "revision", "noise", VERSIONS)
"""What a fingerprint says for people: the model's digests and sigma decide."""
OF_A_VERSION = ("module_settings", "tokenizer.rules")
"""What other versions of packages may write otherwise, as they may leave out entries of a configuration."""
SAME_SIGMA = 1e-6
"""By how much of itself a measured sigma may differ: it does between versions of torch."""
GO_ON = "free some space or make the folder writable, then start the same run again: it goes on where it stopped"
_ABSENT = object()


def join_manifest(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the manifest of a new store, or joins the run whose manifest is there.

    Of several processes that do this at once one makes it, and all read the same.

    Args:
        path: the manifest.
        fingerprint: plain JSON values.

    Returns:
        The manifest that is in the folder now.

    Raises:
        StoreError: it cannot be written or read, was edited, is of a newer format, or is of another run.
    """
    if not os.path.exists(path):
        write_new(path, _text({"format_version": STORE_VERSION, "fingerprint": fingerprint, "facts": {}}), GO_ON)
    manifest = read_manifest(path)
    check_fingerprint(manifest["fingerprint"], fingerprint, str(path.parent))
    if manifest["format_version"] < STORE_VERSION:
        raise StoreError(
            f"{path.parent} was written by an earlier version of fasttrace, which kept no metric but prob: give "
            "another folder; average, report and export still read it"
        )
    return manifest


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest, whole or not at all.

    Raises:
        StoreError: it cannot be written.
    """
    with atomic_write(path, GO_ON) as temporary:
        temporary.write_bytes(_text(manifest))


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads a manifest and checks that it is what was written.

    Returns:
        ``format_version``, ``fingerprint`` and ``facts``.

    Raises:
        StoreError: no such file, no manifest, of a newer format, or edited.
    """
    manifest = _load(path)
    version = manifest.get("format_version")
    if isinstance(version, int) and version > STORE_VERSION:
        raise StoreError(
            f"{path.parent} is a store of format version {version}, this fasttrace reads up to {STORE_VERSION}: "
            "upgrade fasttrace, or give another folder"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest) or not isinstance(manifest.get("fingerprint"), dict):
        raise StoreError(
            f"{path} was edited or damaged (its checksum is {_checksum(manifest)[:8]}, it says {str(checksum)[:8]}): "
            "undo the edit; or delete that file and run again, the parts are then compared with that run"
        )
    try:
        _check_contents(manifest)
    except NONSENSE as error:
        raise StoreError(f"{path} holds what no run writes ({why(error)}): take it from where it was made") from error
    return manifest


def _check_contents(manifest: Mapping[str, Any]) -> None:
    """Refuses values that no run writes under a checksum that is right; raises one of `NONSENSE`."""
    version, facts = manifest["format_version"], manifest["facts"]
    expect(type(version) is int and version > 0, f"format_version {version!r}: expected a whole number")
    expect(isinstance(manifest["fingerprint"].get(VERSIONS, {}), dict), f"{VERSIONS}: expected an object")
    expect(isinstance(facts, dict), f"facts {facts!r}: expected an object")
    name, count, ids = facts.get("name", ""), facts.get("n_facts", 0), facts.get("ids", [])
    expect(isinstance(name, str), f"name {name!r}: expected text")
    expect(type(count) is int and 0 <= count < 2**63, f"n_facts {count!r}: expected a number of facts")
    expect(isinstance(facts.get("bad_rows", []), list), "bad_rows: expected a list")
    expect(isinstance(ids, list) and all(isinstance(each, str) for each in ids), "ids: expected a list of texts")
    expect("ids" not in facts or len(set(ids)) == len(ids) == count, f"{len(ids)} ids of {count} facts")


def check_fingerprint(there: Mapping[str, Any], here: Mapping[str, Any], where: str) -> None:
    """Refuses a run that would give other numbers than the ones that are there.

    Args:
        there: the fingerprint that was found.
        here: that of this run.
        where: what holds the first one.

    Raises:
        StoreError: it lists what differs.
    """
    if "config" in here and "config" not in there:
        raise StoreError(
            f"{where} was written by an earlier version of fasttrace, which did not note enough of the model to tell "
            "whether this is the same one: give another folder; average, report and export still read it"
        )
    found = differences(*compared(there, here))
    if found:
        raise StoreError(
            f"{where} holds another run ({'; '.join(found)}): give another folder, or run with the values that it "
            f"was made with{_advice(there, found)}"
        )


def _advice(there: Mapping[str, Any], found: list[str]) -> str:
    if not any(difference.startswith("sigma ") for difference in found):
        return ""
    return f" (--noise {there.get('sigma')} for its noise, or --noise-subjects for the subjects it was measured on)"


def compared(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of two fingerprints what has to be equal.

    Args:
        there: of one run.
        here: of another.

    Returns:
        The same without names and versions, nested keys joined by dots. Between versions of transformers or torch, also
        without `OF_A_VERSION` and without what only one of the two writes into a configuration.
    """
    left, right = (_flat({key: value for key, value in side.items() if key not in NOTED}) for side in (there, here))
    if _packages(there) != _packages(here):
        of_one = {key for key in left.keys() ^ right.keys() if key.startswith("config.")}
        left, right = (
            {key: value for key, value in side.items() if key not in of_one and key not in OF_A_VERSION}
            for side in (left, right)
        )
    return left, right


def _packages(fingerprint: Mapping[str, Any]) -> list[Any]:
    versions = fingerprint.get(VERSIONS)
    return [versions.get(name) if isinstance(versions, Mapping) else None for name in ("torch", "transformers")]


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], places: tuple[str, str] = ("there", "here")
) -> list[str]:
    """Spells out what differs, one entry a value: ``"sigma 0.13 there, 0.15 here"``.

    A sigma may differ by `SAME_SIGMA`, and streams in their order.

    Args:
        there: plain JSON values, nested or not.
        here: those to compare with.
        places: what to call the two.

    Returns:
        One string per difference; none when they agree.
    """
    left, right = _flat(there), _flat(here)
    keys = [key for key in left | right if not _same(key, left.get(key, _ABSENT), right.get(key, _ABSENT))]
    return [f"{key} {_shown(left, key)} {places[0]}, {_shown(right, key)} {places[1]}" for key in keys]


def _load(path: Path) -> dict[str, Any]:
    try:
        manifest = parsed(read_regular(path))
    except FileNotFoundError as error:
        found = f"no {path.name}" if os.path.isdir(path.parent) else "no folder"
        raise StoreError(
            f"{found} at {path.parent}: expected a folder written by 'fasttrace run'; check the path"
        ) from error
    except StoreError:
        raise
    except ValueError as error:
        manifest = error
    if not isinstance(manifest, dict):
        raise StoreError(
            f"{path} is no manifest of fasttrace, or a damaged one: give another folder; or, if parts lie beside it, "
            "delete that file and run again, the parts are then compared with that run"
        )
    return manifest


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=2) + "\n").encode()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _same(key: str, left: Any, right: Any) -> bool:
    if key == "streams" and isinstance(left, list) and isinstance(right, list):
        return set(map(str, left)) == set(map(str, right))
    if not (isinstance(left, float) and isinstance(right, float)):
        return left == right
    close = key.rpartition(".")[2] == "sigma" and math.isclose(left, right, rel_tol=SAME_SIGMA)
    return close or left == right or (math.isnan(left) and math.isnan(right))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"
