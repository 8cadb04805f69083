"""Removes passwords and tokens from text that is shown or kept; no other module does."""

import os
import re
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "HF_TOKEN")
"""Environment variables whose value is hidden everywhere."""
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
"""Environment variables whose address may hold a password, which is hidden everywhere."""
_SHORTEST = 4  # signs: a shorter secret would be found in ordinary words


def _spelled(word: str) -> str:
    """A pattern of the word in either case, each of its letters as it is or percent-encoded."""
    return "".join(f"(?:{c}|%{ord(c):02x}|%{ord(c.upper()):02x})" if c.isalpha() else "[_-]?" for c in word)


_NAMES = ("password", "passwd", "passphrase", "passcode", "pwd", "secret", "token", "credential")
_NAMES += ("credentials", "api_key", "access_key", "private_key", "account_key", "secret_key", "sslkey")
_KEY = rf"(?:{'|'.join(map(_spelled, _NAMES))}|(?<![a-z]){_spelled('pass')})"
_BLANK = r"(?:\s|%20|\+)*"
_QUOTED = r"""'(?:[^'\\]|\\.|'')*'?|"(?:[^"\\]|\\.|"")*"?|\{(?:[^}]|\}\})*\}?"""
_QUOTED += r"|%7B.*?(?:%7D|$)|%27.*?(?:%27|$)"
_SIGN = r"""(?:\\.|[^\s&'"]|['"](?=\w))"""
_BARE = rf"""{_SIGN}+(?:[ \t]+[^\s&;='"]+)*(?=;)|{_SIGN}+"""
_ASSIGNED = re.compile(rf"({_KEY}[\"']?{_BLANK}={_BLANK})(?:{_QUOTED}|{_BARE})", re.I)
_BRACES = r"%(?:25)*7B.*?%(?:25)*7D"
_UNTIL = r"""(?:(?!%(?:25)*(?:3B|26))[^\s&'"])+"""
_ENCODED = re.compile(rf"({_KEY}{_BLANK}%(?:25)*3D{_BLANK})(?:{_BRACES}|{_UNTIL})", re.I)
_IN_JSON = re.compile(rf"""(([\"'])[\w.-]{{0,40}}{_KEY}\2\s*:\s*)(?:{_QUOTED}|[^\s,}}]+)""", re.I)
_BEARER = re.compile(r"(\bBearer\s+|(?i:\bauthorization[:=]\s*(?:basic|bearer)\s+))[\w.~+/=-]{4,}")
_OPTION = re.compile(rf"((?<!\S)--?{_KEY}\s+)(?:{_QUOTED}|[^\s'\"]+)", re.I)
_HEADER = re.compile(r"(\bx-api-key:\s*|\bauthorization[:=]\s*(?!Bearer|Basic))[^\s'\"]+", re.I)
_QUERY = re.compile(r"([?&](?:sig|sas|auth|key)=)[^\s&'\"]+", re.I)
_HUGGING_FACE = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_WITH_BLANKS = r"[^\s/@:]+:(?!\d{1,5}\b)[^\n/@]{1,80}(?=@[\w\[])"
_USER = re.compile(rf"//([^\s/@:]*:\S*|{_WITH_BLANKS}|[^\s/]*)@")


def masked(text: str) -> str:
    """The text without passwords and tokens, whatever signs these have: `//user:password@`, `password=`.

    Addresses lose their user too. Also hidden is what `VARIABLES` and `ADDRESSES` hold, in any place.
    """
    for secret in _known_secrets():
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    text = _USER.sub("//", text)
    text = _ENCODED.sub(_hide, text)
    text = _ASSIGNED.sub(_hide, text)
    text = _IN_JSON.sub(_hide, text)
    for pattern in (_BEARER, _OPTION, _HEADER, _QUERY):
        text = pattern.sub(_hide, text)
    return _HUGGING_FACE.sub(HIDDEN, text)


def _hide(found: re.Match[str]) -> str:
    return found[1] + HIDDEN


def _known_secrets() -> list[str]:
    """The secrets of the environment, the longest first."""
    found = {os.environ.get(name, "") for name in VARIABLES}
    for name in ADDRESSES:
        found |= _secrets_of(os.environ.get(name, ""))
    found |= {unquote(secret) for secret in found} | {unquote_plus(secret) for secret in found}
    return sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)


def _secrets_of(address: str) -> set[str]:
    """The password of an address, and the parts in which a library may read and show it."""
    authority = address.partition("//")[2].partition("?")[0]
    user, at, _ = authority.rpartition("@")
    secret = user.partition(":")[2] if at else ""
    return {secret, *re.split("[@:/#]", secret)}
