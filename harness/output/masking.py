"""Removes passwords and tokens from text that is shown or stored; no other module does this."""

import os
import re
from urllib.parse import unquote, unquote_plus

HIDDEN = "***"
VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "HF_TOKEN")
"""Environment variables whose value is hidden wherever it appears."""
ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
"""Environment variables with an address whose password is hidden wherever it appears."""
_SHORTEST = 4  # characters; shorter secrets would also match ordinary words


def _spelled(word: str) -> str:
    """A pattern for the word in upper or lower case, each letter as it is or percent-encoded."""
    return "".join(f"(?:{c}|%{ord(c):02x}|%{ord(c.upper()):02x})" if c.isalpha() else "[_-]?" for c in word)


_SURE = ("password", "passwd", "passphrase", "pwd", "api_key", "access_key", "secret_key", "client_secret")
"""Names that a colon may follow without quotes, as in YAML; `token: 5` and `pass: 3 cm` are ordinary text."""
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
_IN_YAML = re.compile(rf"((?:{'|'.join(map(_spelled, _SURE))})[ \t]*:[ \t]+)(?:{_QUOTED}|[^\s,}}'\"]+)", re.I)
_BEARER = re.compile(r"(\bBearer\s+|(?i:\bauthorization[:=]\s*(?:basic|bearer)\s+))[\w.~+/=-]{4,}")
_OPTION = re.compile(rf"((?<!\S)--?{_KEY}\s+)(?:{_QUOTED}|[^\s'\"]+)", re.I)
_HEADER = re.compile(r"(\bx-api-key:\s*|\bauthorization[:=]\s*(?!Bearer|Basic))[^\s'\"]+", re.I)
_QUERY = re.compile(r"([?&](?:sig|sas|auth|key|pw)=)[^\s&'\"]+", re.I)
_HUGGING_FACE = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_WITH_BLANKS = r"[^\s/@:]+:(?!\d{1,5}\b)[^\n/@]{1,80}(?=@[\w\[])"
_USER = re.compile(rf"//([^\s/@:]*:\S*|{_WITH_BLANKS}|[^\s/]*)@")


def masked(text: str) -> str:
    """The text without passwords and tokens, such as in `//user:password@` or `password=`.

    Addresses also lose their user. The secrets in `VARIABLES` and `ADDRESSES` are hidden everywhere.
    """
    for secret in _known_secrets():
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    text = _USER.sub("//", text)
    text = _ENCODED.sub(_hide, text)
    text = _ASSIGNED.sub(_hide, text)
    text = _IN_JSON.sub(_hide, text)
    for pattern in (_IN_YAML, _BEARER, _OPTION, _HEADER, _QUERY):
        text = pattern.sub(_hide, text)
    return _HUGGING_FACE.sub(HIDDEN, text)


def _hide(found: re.Match[str]) -> str:
    return found[1] + HIDDEN


def _known_secrets() -> list[str]:
    """The secrets in environment variables, the longest first."""
    found = {os.environ.get(name, "") for name in VARIABLES}
    for name in ADDRESSES:
        found |= _secrets_of(os.environ.get(name, ""))
    found |= {unquote(secret) for secret in found} | {unquote_plus(secret) for secret in found}
    return sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)


def _secrets_of(address: str) -> set[str]:
    """The password of an address, and the parts into which a library may split it."""
    authority = address.partition("//")[2].partition("?")[0]
    user, at, _ = authority.rpartition("@")
    secret = user.partition(":")[2] if at else ""
    return {secret, *re.split("[@:/#]", secret)}
