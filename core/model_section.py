"""The `model` section of the cluster file, which every role reads."""

from __future__ import annotations

import dataclasses
import pathlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    path: str
    """Folder of the checkpoint (config.json, tokenizer.json, *.safetensors). A relative one starts at the cluster file's folder."""
    tokenizer: str = ""
    """Folder whose tokenizer.json the router uses; empty: that of `path`. For shapes without one, with engine.load: dummy, where any
    will do: ids that the tokenizer does not know have no text."""
    served_name: str = ""
    """Name that clients ask for; empty: the folder's name."""

    @property
    def public_name(self) -> str:
        return self.served_name or pathlib.Path(self.path).name

    @property
    def tokenizer_folder(self) -> pathlib.Path:
        return pathlib.Path(self.tokenizer or self.path)

    def relative_to(self, folder: pathlib.Path) -> ModelSection:
        """With absolute paths."""
        tokenizer = str((folder / self.tokenizer).resolve()) if self.tokenizer else ""
        return dataclasses.replace(self, path=str((folder / self.path).resolve()), tokenizer=tokenizer)
