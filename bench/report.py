"""The files that measurements are kept in."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.card import slug

RESULTS = Path(__file__).parent / "results"


def new_report(tool: str, about: dict[str, Any]) -> dict[str, Any]:
    """The head of a report: which tool, when, and the card."""
    return {"tool": tool, "date": datetime.now(UTC).isoformat(timespec="seconds"), "card": about}


def path_of(report: dict[str, Any], folder: Path = RESULTS) -> Path:
    """<folder>/<device>/<date and time>-<commit>-<tool>.json."""
    about, stamp = report["card"], re.sub(":", "", report["date"][:16])
    return folder / slug(about) / f"{stamp}-{about['commit']}-{report['tool']}.json"


def write(report: dict[str, Any], path: Path) -> Path:
    """Writes a report, or what there is of it so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    return part.replace(path)
