"""Mailing-list posts with their senders, from the SpamAssassin public corpus as npm carries it.

Only the messages that were sorted as wanted mail are read (`easy-ham-1`, `easy-ham-2`). Of each the author's own
words are kept: the plain-text parts up to the signature, without quoted lines. A post needs at least `MIN_WORDS`
words; one robot's posts are left out.
"""

from __future__ import annotations

import email
import email.message
import email.policy
import email.utils
import json
import re
import tarfile
from pathlib import Path

MIN_WORDS = 12
ROBOT = "rssfeeds@spamassassin.taint.org"
_FOLDERS = ("package/data/easy-ham-1/", "package/data/easy-ham-2/")
_QUOTED = re.compile(r"^\s*[>|%:]|wrote:\s*$")


def read_mail(path: Path) -> tuple[list[str], list[str]]:
    """Posts and their senders' addresses (lower case), two lists of one length, in the order of the archive's names.

    `path` is the archive that npm packs. ValueError if it is no such archive or holds no post.
    """
    try:
        with tarfile.open(path) as archive:
            members = sorted(
                (m for m in archive if m.name.startswith(_FOLDERS) and m.name.endswith(".json")), key=lambda m: m.name
            )
            messages = [json.load(archive.extractfile(m))["text"] for m in members]  # type: ignore[arg-type]
    except (tarfile.TarError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"data {path} is not the mail archive ({error}): fetch it with `make finetune-mail`"
        ) from error
    texts, senders = [], []
    for raw in messages:
        message = email.message_from_string(raw, policy=email.policy.compat32)
        sender = email.utils.parseaddr(str(message.get("From", "")))[1].lower()
        text = own_words(_plain_text(message))
        if sender and sender != ROBOT and len(text.split()) >= MIN_WORDS:
            texts.append(text)
            senders.append(sender)
    if not texts:
        raise ValueError(
            f"data {path} holds no posts under {' or '.join(_FOLDERS)}: fetch it with `make finetune-mail`"
        )
    return texts, senders


def own_words(body: str) -> str:
    """The body up to the signature (`-- ` or a rule of underscores), without quoted lines and who-wrote lines."""
    lines = []
    for line in body.splitlines():
        if line.rstrip() == "--" or line.startswith(("-- ", "_______")):
            break
        if not _QUOTED.search(line):
            lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _plain_text(message: email.message.Message) -> str:
    parts = []
    for part in message.walk():
        if part.get_content_type() == "text/plain" and not part.is_multipart():
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                parts.append(payload.decode("utf-8", errors="replace"))
    return "\n".join(parts)
