"""What a sentence-transformers folder says beside the model: its parts, pooling, text length and tokenizer.

A plain Hugging Face folder, without `modules.json`, is read the same way; it just says less.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from prime_jax import files
from prime_jax.errors import ConfigError, DataError
from prime_jax.nn.bert import Pooling
from prime_jax.pretrained.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS: tuple[str, ...] = get_args(Pooling)
SUPPORTED_MODULES = (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
FLAG_PREFIX = "pooling_mode_"


class SentenceFolder(NamedTuple):
    """A parsed folder.

    Attributes:
        transformer: Where config.json, the tokenizer and the weights are.
        pooling_file: Where the pooling was read from, for messages.
        pooling: The pooling the folder asks for, or None where it says nothing.
        max_length: Longest text in tokens that the folder asks for, or None.
        tokenizer_limit: Longest text in tokens that the tokenizer was made for, or None.
        lower_case: Whether texts are lower-cased before the tokenizer sees them.
    """

    transformer: Path
    pooling_file: Path
    pooling: str | None
    max_length: int | None
    tokenizer_limit: int | None
    lower_case: bool

    @classmethod
    def read(cls, folder: Path) -> "SentenceFolder":
        """Read modules.json, the pooling module, sentence_bert_config.json and tokenizer_config.json.

        Raises:
            DataError: If the folder or a file it names is missing, or it has a part we do not compute.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        transformer, pooling_file = folder, folder / "1_Pooling" / "config.json"
        if (folder / "modules.json").exists():
            paths = _modules(folder / "modules.json")
            transformer = folder / paths["Transformer"]
            if "Pooling" in paths:
                pooling_file = folder / paths["Pooling"] / "config.json"
        settings = _optional(transformer / "sentence_bert_config.json")
        return cls(
            transformer=transformer,
            pooling_file=pooling_file,
            pooling=_pooling(pooling_file) if pooling_file.exists() else None,
            max_length=_length(transformer / "sentence_bert_config.json", "max_seq_length"),
            tokenizer_limit=_length(transformer / "tokenizer_config.json", "model_max_length"),
            lower_case=bool(settings.get("do_lower_case", False)),
        )

    def choose_pooling(self, wanted: Pooling | None) -> Pooling:
        """The pooling to use: the one wanted, else the folder's.

        Raises:
            ConfigError: If neither says anything.
            DataError: If the folder asks for a pooling we do not compute.
        """
        if wanted is not None:
            return wanted
        if self.pooling is None:
            raise ConfigError(f"{self.pooling_file}: missing, so say pooling='mean' or pooling='cls'")
        if self.pooling not in POOLINGS:
            raise DataError(f"{self.pooling_file}: unsupported pooling {self.pooling!r}, only mean or cls")
        return cast(Pooling, self.pooling)

    def choose_length(self, wanted: int | None, positions: int) -> int:
        """The longest text in tokens: the one wanted, else the folder's, else what tokenizer and model allow.

        Raises:
            ConfigError: If it is not between 3 ([CLS], a token, [SEP]) and `positions`.
        """
        length = wanted if wanted is not None else self.max_length
        if length is None:
            length = min(positions, self.tokenizer_limit or positions)
        if not 3 <= length <= positions:
            raise ConfigError(
                f"{self.transformer}: max_length {length} is not from 3 to {positions}, the model's positions"
            )
        return length

    def tokenizer(self, vocab_size: int, max_length: int) -> "Tokenizer":
        """The folder's tokenizer, cutting at `max_length` and never padding.

        Raises:
            DataError: If it is missing, damaged, or has ids the model has no embedding for.
            ConfigError: If the `tokenizers` package is not installed.
        """
        path = self.transformer / "tokenizer.json"
        tokenizer = read_tokenizer(path)
        highest = max(tokenizer.get_vocab().values())
        if highest >= vocab_size:
            raise DataError(f"{path}: has token id {highest}, config.json says vocab_size {vocab_size}")
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        return tokenizer


def _modules(path: Path) -> dict[str, str]:
    """Folder of every module by its kind, in order; DataError unless we compute exactly these."""
    listed = files.read_json(path, DataError)
    try:
        paths = {module["type"].rpartition(".")[2]: str(module["path"]) for module in listed}
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{path}: not a list of modules with type and path") from None
    if list(paths) not in SUPPORTED_MODULES or len(paths) != len(listed):
        kinds = ", ".join(module["type"].rpartition(".")[2] for module in listed)
        raise DataError(f"{path}: modules {kinds} are not supported, only Transformer, Pooling, Normalize")
    return paths


def _pooling(path: Path) -> str:
    """Name of the pooling in a Pooling module's config, in its older (flags) or newer (name) form."""
    config = _optional(path)
    if config.get("include_prompt") is False:
        raise DataError(f"{path}: include_prompt false is not supported")
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        names = mode if isinstance(mode, list) else [mode]
    else:
        on = [key for key in config if key.startswith(FLAG_PREFIX) and config[key]]
        flags = [key.removeprefix(FLAG_PREFIX) for key in on]
        names = [{"cls_token": "cls", "mean_tokens": "mean"}.get(flag, flag) for flag in flags]
    return "+".join(map(str, names)) or "none"


def _length(path: Path, key: str) -> int | None:
    """A length in tokens from a JSON file; None where it says nothing, or 1e30, which means no limit."""
    length = _optional(path).get(key)
    if length is None:
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise DataError(f"{path}: {key} is {length!r}, not a positive whole number")
    return length if length < 10**9 else None


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file does not exist."""
    if not path.exists():
        return {}
    content = files.read_json(path, DataError)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content
