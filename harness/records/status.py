"""Whether the process of a run still lives, and why a run did not finish."""

import math
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_CLOCKS = 60  # seconds; a clock may have been changed by this much since a process began


def status_of(record: Mapping[str, Any], owner: int | None) -> str:
    """The status of a run; KILLED if it is RUNNING but its process on this machine is gone."""
    pid, here = record.get("pid", owner), record.get("host") in (None, socket.gethostname())
    if record["status"] != "RUNNING" or not here or pid is None:
        return record["status"]
    began = record["started"] if "pid" in record else None
    return "RUNNING" if alive(pid, began) else "KILLED"


def failure_of(record: Mapping[str, Any], owner: int | None = None) -> dict[str, Any] | None:
    """Why a run did not finish: step, error, reason and hint; None if it finished or is running."""
    if status_of(record, owner) == record["status"]:
        return record.get("failure")
    reason = "its process is gone: killed, out of memory, or the machine was restarted"
    hint = f"The same command continues: {record['command']}"
    return {"step": record.get("at"), "error": None, "reason": reason, "hint": hint}


def alive(pid: int, began: str | None = None) -> bool:
    """Whether a process exists and, if it `began` something then, is not a later one with the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        known = datetime.fromisoformat(began).timestamp() if began else math.inf
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= known + _CLOCKS
    except psutil.NoSuchProcess:
        return False
