"""Reading a Hugging Face tokenizer, with the package that does it only where texts are encoded."""

from pathlib import Path
from typing import TYPE_CHECKING

from prime_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(file: Path) -> "Tokenizer":
    """Open a `tokenizer.json`.

    Raises:
        DataError: If it is missing or damaged.
        ConfigError: If the `tokenizers` package is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(
            'encoding text needs the tokenizers package: pip install "prime-jax[text]"'
        ) from None
    if not file.is_file():
        raise DataError(f"{file}: the file is missing")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as broken:  # the library raises nothing more special
        raise DataError(f"{file}: not a readable tokenizer ({broken})") from None
