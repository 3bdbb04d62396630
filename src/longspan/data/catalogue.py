"""Corpora by name."""

from pathlib import Path

from longspan.data import enwiki6, files, huggingface
from longspan.data.splits import Corpus
from longspan.errors import LongspanError, nearest

_NAMED = {
    "stdlib": (files.stdlib, "source text of the installed Python standard library; no download"),
    "enwiki6": (enwiki6.load, "6 MB of a Wikipedia XML dump, out of the gensim wheel"),
}


def corpora() -> dict[str, str]:
    """Every named corpus and one line about it.

    >>> list(corpora())
    ['stdlib', 'enwiki6']
    """
    return {name: line for name, (_, line) in _NAMED.items()}


def corpus(name: str | Path = "stdlib") -> Corpus:
    """A corpus by name: one of `corpora()`, `hf:<dataset>[/<config>][#column]`, or a path.

    A folder and the standard library are split by file, a single file by bytes, about 90/5/5;
    the same bytes always give the same splits. A folder called as a corpus is: `./stdlib`.

    Raises:
        LongspanError: no such corpus, or nothing in it; the error says how to get what is absent.

    >>> corpus("stdlib").train.dtype
    dtype('uint8')
    """
    name = str(name)
    if name in _NAMED:
        return _NAMED[name][0]()
    if name.startswith("hf:"):
        return huggingface.load(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return files.folder(path)
        if path.is_file():
            return files.file(path)
    except OSError as error:
        raise LongspanError(f"'{name}' cannot be read: {error}.") from error
    raise LongspanError(
        f"no corpus and no file '{name}'{nearest(name, _NAMED)} "
        f"Known: {', '.join(_NAMED)}, hf:<dataset>, or the path of a file or folder."
    )
