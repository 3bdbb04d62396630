"""Corpora read through the Hugging Face `datasets` library."""

from pathlib import Path
from typing import Any

from longspan.data.splits import Corpus, by_document
from longspan.errors import LongspanError

_TEXT = ("string", "large_string", "binary", "large_binary")
_NAMES = {"valid": ("validation", "valid", "dev"), "test": ("test",)}


def load(spec: str) -> Corpus:
    """The rows of one text column as documents; `spec` is `<dataset>[/<config>][#column]`.

    A dataset is a folder written by `save_to_disk`, or a name on the Hub: `owner/name` and
    `owner/name/config`; in two parts of which the Hub has no such owner, the second is the
    config. Its own validation and test splits are kept; one that it lacks is cut by row from
    its training split.

    Raises:
        LongspanError: the library, the dataset, its training split or the column is missing.
    """
    where, _, column = spec.partition("#")
    data = _open(where)
    train = data.get("train")
    if train is None:
        raise LongspanError(
            f"'hf:{where}' has no split 'train', but {', '.join(data)}: save the rows to learn "
            "from under that name."
        )
    column = _column(train, column, where)
    documents = {f"train/{row}": text for row, text in enumerate(_texts(train, column))}
    fixed: dict[str, str] = {}
    for split, names in _NAMES.items():
        for name in [name for name in names if name in data][:1]:
            rows = {f"{split}/{row}": text for row, text in enumerate(_texts(data[name], column))}
            documents |= rows
            fixed |= dict.fromkeys(rows, split)
    if not documents:
        raise LongspanError(f"'hf:{where}' has no text in column '{column}'.")
    return by_document(
        f"hf:{spec}",
        documents,
        licence=train.info.license or "unknown",
        source=f"Hugging Face dataset {where}, column '{column}', {len(documents)} rows",
        fixed=fixed,
    )


def _open(where: str) -> dict[str, Any]:
    """Split → rows."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise LongspanError(
            f"'hf:{where}' needs the datasets library: pip install 'longspan[data]'."
        ) from error
    path = Path(where).expanduser()
    parts = where.split("/")
    # What may be meant, in order; the next is tried when the Hub does not have the one before.
    calls = [(where,), tuple(parts)] if len(parts) == 2 else [("/".join(parts[:2]), *parts[2:])]
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        elif path.is_absolute() or len(parts) > 3:
            raise FileNotFoundError("no such folder")
        else:
            found = _first(datasets, calls)
    except (OSError, ValueError, DatasetsError) as error:
        raise LongspanError(
            f"'hf:{where}' cannot be loaded: {str(error).rstrip('.')}. Expected a folder "
            "written by save_to_disk, or a dataset of the Hub as owner/name or owner/name/config."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        return {str(split): rows for split, rows in found.items()}
    return {"train": found}


def _first(datasets: Any, calls: list[tuple[str, ...]]) -> Any:
    for call in calls[:-1]:
        try:
            return datasets.load_dataset(*call)
        except datasets.exceptions.DatasetNotFoundError:
            continue
    return datasets.load_dataset(*calls[-1])


def _column(rows: Any, column: str, where: str) -> str:
    texts = [name for name, feature in rows.features.items() if _dtype(feature) in _TEXT]
    if not column and ("text" in texts or len(texts) == 1):
        return "text" if "text" in texts else texts[0]
    if column not in texts:
        asked = f"has no text column '{column}'" if column else "does not say which column to read"
        raise LongspanError(
            f"'hf:{where}' {asked}; its text columns: {', '.join(texts) or 'none'}. "
            f"Name one as 'hf:{where}#column'."
        )
    return column


def _dtype(feature: Any) -> str | None:
    return getattr(feature, "dtype", None)


def _texts(rows: Any, column: str) -> list[bytes]:
    """The rows that hold anything."""
    texts = (text for part in rows.select_columns(column).iter(1000) for text in part[column])
    return [text if isinstance(text, bytes) else text.encode() for text in texts if text]
