"""Text infilling: a template turns an example into a sentence with one mask, and a word stands for each class.

A classifier's head starts at random, and under noise it stays bad for long; the masked language model's own head knows the
words from the beginning (Gao, Fisch and Chen, ACL 2021, and for private training Li et al., ICLR 2022).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MASK = "<mask>"


@dataclass(frozen=True)
class Part:
    """The text of one column. bare: without the mark at its end. lower: with a small first letter."""

    column: str
    bare: bool = False
    lower: bool = False
    before: str = ""

    def of(self, example: Mapping[str, Any]) -> str:
        text = str(example[self.column]).strip()
        if self.bare and text[-1:] in tuple(string.punctuation):
            text = text[:-1]
        if self.lower:
            text = text[:1].lower() + text[1:]
        return self.before + text


@dataclass(frozen=True)
class Template:
    """parts: columns, fixed words and MASK, in order. words: one for each class, in the order of the labels."""

    parts: tuple[str | Part, ...]
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.parts.count(MASK) != 1:
            raise ValueError(f"parts={self.parts!r} must hold {MASK!r} once: the label's word is looked for there")

    def columns(self) -> tuple[str, ...]:
        return tuple(part.column for part in self.parts if isinstance(part, Part))


def word_ids(template: Template, tokenizer: Any) -> list[int]:
    """The token of each label's word, as it stands after a space. ValueError if one is not a single token."""
    found = []
    for word in template.words:
        ids = tokenizer.encode(" " + word, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the label word {word!r} is {len(ids)} tokens of this tokenizer, or unknown to it: choose a model whose "
                "vocabulary has it as one token, as RoBERTa's does"
            )
        found.append(ids[0])
    return found


def fill(template: Template, example: Mapping[str, Any], tokenizer: Any, max_length: int) -> list[int]:
    """The example as token ids, at most `max_length`, with exactly one mask.

    What is too long loses the end of its longest column; the words of the template and the mask always stay. ValueError
    if they alone are longer.
    """
    pieces: list[list[int]] = []
    texts: list[int] = []
    for part in template.parts:
        if isinstance(part, Part):
            texts.append(len(pieces))
            pieces.append(_without_masks(tokenizer.encode(part.of(example), add_special_tokens=False), tokenizer))
        elif part == MASK:
            pieces.append([tokenizer.mask_token_id])
        else:
            pieces.append(tokenizer.encode(part, add_special_tokens=False))
    too_many = sum(map(len, pieces)) + 2 - max_length
    while too_many > 0:
        longest = max(texts, key=lambda i: len(pieces[i]))
        if not pieces[longest]:
            raise ValueError(f"max_length is {max_length}, too short for the template's own words: raise it")
        pieces[longest].pop()
        too_many -= 1
    return [tokenizer.cls_token_id, *(token for piece in pieces for token in piece), tokenizer.sep_token_id]


def _without_masks(ids: Sequence[int], tokenizer: Any) -> list[int]:
    # A text may spell the mask out, and a second one would be taken for the template's.
    return [token for token in ids if token != tokenizer.mask_token_id]
