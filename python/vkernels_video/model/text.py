"""Questions to token ids and back: bytes for the small models, a checkpoint's own tokenizer for the large ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

BEGIN, END = 256, 257  # beside the 256 bytes; 258 is the mark of a video token
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
FOLDERS = (".", "tokenizer", "LLM", "llm")  # where checkpoints keep it
QUESTION_FOLDERS = ("qformer_tokenizer",)


class Text(Protocol):
    """What a model needs of a tokenizer."""

    begin: int | None
    end: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Bytes:
    """A token per byte."""

    begin: int | None = BEGIN
    end: int | None = END

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD; tokens that are no bytes, nothing."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Missing:
    """In place of a tokenizer that was not there to load: says so when it is needed."""

    begin: int | None = None
    end: int | None = None

    def __init__(self, what: str):
        self.what = what

    def encode(self, text: str) -> list[int]:
        raise ValueError(f"VideoLLM: {self.what} must come with the checkpoint's folder, got none ({', '.join(FILES)})")

    def decode(self, ids: Iterable[int]) -> str:
        raise ValueError(f"VideoLLM: {self.what} must come with the checkpoint's folder, got none ({', '.join(FILES)})")


class Tokenizer:
    """One of transformers' tokenizers. `special`: with the marks it puts around a text of its own accord."""

    def __init__(self, inner: Any, special: bool = False):
        self.inner, self.special = inner, special
        self.begin: int | None = inner.bos_token_id
        self.end: int | None = inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=self.special)

    def decode(self, ids: Iterable[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)


def find(folders: Iterable[Path], places: Iterable[str], vocab: int, what: str, special: bool = False) -> Text:
    """The tokenizer of a checkpoint in one of `places` of its folders, read by transformers; no code of it runs."""
    from transformers import AutoTokenizer

    for folder in (folder / place for folder in folders if folder.is_dir() for place in places):
        if not any((folder / name).is_file() for name in FILES):
            continue
        try:
            inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever a damaged file, or a library that is not installed, makes of it
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"VideoLLM: {what} in {folder} cannot be read: {why}") from error
        if len(inner) > vocab:
            raise ValueError(
                f"VideoLLM: {what} in {folder} must fit the vocabulary of {vocab}, got {len(inner)} tokens"
            )
        return Tokenizer(inner, special)
    return Missing(what)
