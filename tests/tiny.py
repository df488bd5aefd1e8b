"""Models, tokenizers and data small enough for a test, written to disk as a user would have them."""

import csv
import io
import json
import tarfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "good", "fine", "bad", "poor", *(f"word{i}" for i in range(40))]


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def save_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=len(WORDS),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=len(WORDS),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sentence(number: int, word: str) -> str:
    """A sentence with the given word and a length that depends on its number."""
    filler = [f"word{(7 * number + i) % 40}" for i in range(number % 9)]
    return " ".join([*filler, word, f"word{number % 40}"])


def save_movies(path: Path, rows: int = 120) -> Path:
    """A rating file: ids 1, 2, ...; scores 2, -2, 0.3, -0.3 and 0 in turn; the word tells the sign."""
    lines = ["id\trating\ttext"]
    for i in range(rows):
        score = [2.0, -2.0, 0.3, -0.3, 0.0][i % 5]
        lines.append(f"{i + 1}\t{score}\t{sentence(i, 'good' if score > 0 else 'bad')}")
    path.write_text("\n".join(lines) + "\n")
    return path


def message(sender: str, body: str) -> str:
    return f"From: Some Body <{sender}>\nTo: list@example.org\nSubject: hello\nContent-Type: text/plain\n\n{body}"


def save_mail(path: Path, senders: int = 20) -> Path:
    """An archive like the npm package's: sender i has 1 + i % 3 posts; a robot, spam and one-liners are in it too."""
    posts = [
        (
            f"package/data/easy-ham-1/{i:03d}-{k}.json",
            message(f"User{i}@Example.org", f"{sentence(i + k, 'good')}\n" * 12),
        )
        for i in range(senders)
        for k in range(1 + i % 3)
    ]
    long = "word1 " * 20
    posts += [
        ("package/data/easy-ham-2/robot.json", message("rssfeeds@spamassassin.taint.org", long)),
        ("package/data/easy-ham-2/short.json", message("brief@example.org", "too short")),
        ("package/data/spam-1/spam.json", message("spam@example.org", long)),
    ]
    with tarfile.open(path, "w:gz") as archive:
        for name, text in posts:
            content = json.dumps({"id": name, "text": text}).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def records(rows: int = 60) -> list[dict[str, str]]:
    return [
        {
            "said": sentence(i, "good" if i % 2 else "bad"),
            "kind": "praise" if i % 2 else "blame",
            "who": f"user{i % 15}",
        }
        for i in range(rows)
    ]


def save_jsonl(path: Path, rows: int = 60) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records(rows)))
    return path


def save_csv(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["said", "kind", "who"])
        writer.writeheader()
        writer.writerows(records())
    return path
