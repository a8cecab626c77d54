"""The recipe's options: one flat, frozen `Config`, read from a YAML file and then the command line, which wins."""

from __future__ import annotations

import argparse
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from recipes.xsum.errors import RecipeError


class ConfigError(RecipeError, ValueError):
    """A setting that cannot work; the message names it and what to do."""


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field with its help text and limits: `low <= value`, `above < value < below`, `value in choices`."""
    metadata = {"help": help, "low": low, "above": above, "below": below, "choices": tuple(choices)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every option of a run. Raises `ConfigError` where a value or a combination cannot work."""

    # Model
    model: str | None = option(None, "Hub name or local folder of pre-trained weights (or give model_config)")
    model_config: dict | None = option(None, "train from scratch: model_type and any field of its Transformers config")
    attn_implementation: str = option("bsa_dense", "eager, sdpa, flash_attention_2, bsa_dense, bsa_sparse, ...")
    block_sparse: dict | None = option(
        None, "attn_implementation: bsa_sparse: the arguments of hf_flashbsa.BlockSparseConfig; none = the model's"
    )
    dropout: float | None = option(
        None, "residual, embedding and activation dropout; none = the model's", low=0, below=1
    )
    attention_dropout: float | None = option(None, "dropout of attention weights; none = the model's", low=0, below=1)
    gradient_checkpointing: bool = option(False, "recompute each layer in the backward pass instead of storing it")
    padding_free: bool = option(False, "layers skip padding; with attn_implementation bsa_dense or bsa_sparse")
    cuda_graphs: bool = option(
        False, "padding_free: layers replay CUDA graphs, for GPUs that wait for Python; other machines ignore it"
    )
    fused_linear_cross_entropy: bool = option(False, "the loss without logits, by liger-kernel; needs a GPU")

    # Data
    dataset: str = option("generated", "where documents come from", choices=("generated", "hub", "files"))
    dataset_name: str = option("EdinburghNLP/xsum", "dataset: hub: the data set's name on the Hub")
    train_file: str | None = option(
        None, "dataset: files: JSON lines (or .jsonl.gz) with a document and a summary each"
    )
    validation_file: str | None = option(None, "dataset: files: as train_file")
    test_file: str | None = option(None, "dataset: files: as train_file")
    text_column: str = option("document", "column that holds the document")
    summary_column: str = option("summary", "column that holds the summary")
    generated_examples: int = option(2000, "dataset: generated: number of training documents", low=1)
    corpus_seed: int = option(0, "dataset: generated: which corpus", low=0)
    max_train_examples: int | None = option(None, "use only the first documents of the training split", low=1)
    max_eval_examples: int | None = option(None, "use only the first documents of a held-out split", low=1)
    tokenizer: str | None = option(
        None, "Hub name or folder; none = the model's own, or a BPE of the training documents"
    )
    vocab_size: int = option(4096, "size of a BPE vocabulary made from the training documents", low=300)
    max_source_length: int = option(512, "tokens of a document; longer ones are cut", low=2)
    max_target_length: int = option(64, "tokens of a summary; longer ones are cut", low=2)
    prompt_template: str = option("{document}\nTL;DR:", "decoder-only models: what stands before the summary")
    group_by_length: bool = option(True, "batch documents of similar length: less padding")

    # Optimisation
    seed: int = option(0, "initial weights, data order and dropout", low=0, below=2**32)
    max_steps: int | None = option(None, "number of optimiser steps; wins over num_epochs", low=1)
    num_epochs: int = option(1, "passes over the training documents", low=1)
    per_device_batch_size: int = option(8, "documents of a forward pass on one device", low=1)
    token_budget: int | None = option(
        None,
        "instead of per_device_batch_size, which then counts for nothing: as many documents as have at most so many "
        "source tokens (decoder-only: with summaries), padding included unless padding_free",
        low=1,
    )
    gradient_accumulation_steps: int = option(1, "forward passes of an optimiser step", low=1)
    learning_rate: float = option(3e-5, "peak learning rate of AdamW", above=0)
    warmup_steps: int = option(0, "steps over which the learning rate rises from 0", low=0)
    lr_scheduler: str = option("linear", "decay after the warm-up", choices=("linear", "cosine", "constant"))
    weight_decay: float = option(0.01, "decoupled weight decay; never on biases and norms", low=0)
    adam_betas: list[float] = option([0.9, 0.999], "AdamW's two averaging factors", low=0, below=1)
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this", above=0)
    label_smoothing: float = option(0.0, "share of the target spread over the vocabulary", low=0, below=1)
    mixed_precision: str = option("no", "bf16: autocast with float32 weights", choices=("no", "bf16"))
    require_cuda: bool = option(False, "refuse to train without a GPU")

    # Evaluation
    eval_every: int | None = option(
        None, "steps between evaluations on the validation split; none = only at the end", low=1
    )
    rouge: str = option("end", "when to generate summaries and score them", choices=("never", "end", "every_eval"))
    final_split: str = option("test", "held-out split of the evaluation at the end", choices=("validation", "test"))
    eval_untrained: bool = option(False, "also score the model before its first step")
    per_device_eval_batch_size: int = option(16, "documents of an evaluation batch on one device", low=1)
    num_beams: int = option(4, "beams of the search; 1 = greedy", low=1)
    max_new_tokens: int = option(60, "longest summary", low=1)
    min_new_tokens: int = option(0, "shortest summary", low=0)
    length_penalty: float = option(1.0, "above 0 favours longer summaries (beam search)")
    no_repeat_ngram_size: int = option(0, "never repeat an n-gram of this size; 0 = allow", low=0)
    bootstrap_samples: int = option(1000, "resamplings for ROUGE's 95 % interval", low=1)

    # Run
    output_dir: str = option("runs/xsum", "folder of everything the run writes")
    log_every: int = option(10, "steps between lines of metrics.jsonl", low=1)
    save_every: int = option(500, "steps between checkpoints", low=1)
    keep_checkpoints: int = option(2, "newest checkpoints to keep", low=1)
    report_to: list[str] = option(["tensorboard"], "Accelerate's trackers; [] = none")

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check_limits(spec.name, getattr(self, spec.name), spec.metadata)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if (self.model is None) == (self.model_config is None):
            raise ConfigError(
                "give either model (pre-trained weights) or model_config (train from scratch), one of them"
            )
        if self.model_config is not None and "model_type" not in self.model_config:
            raise ConfigError("model_config needs model_type, for example {model_type: bart, d_model: 128}")
        if self.block_sparse is not None and self.attn_implementation != "bsa_sparse":
            raise ConfigError(f"block_sparse needs attn_implementation: bsa_sparse, not {self.attn_implementation}")
        if self.attn_implementation == "bsa_sparse" and self.block_sparse is None and self.model is None:
            raise ConfigError("bsa_sparse needs block_sparse, for example {pattern: local, window: 128}")
        files = ("train_file", "validation_file", "test_file")
        if self.dataset == "files":
            if missing := [f"{split}_file" for split in self.splits if getattr(self, f"{split}_file") is None]:
                raise ConfigError(
                    f"dataset: files needs {' and '.join(missing)} "
                    f"(final_split is {self.final_split}, eval_every {self.eval_every})"
                )
        elif given := [name for name in files if getattr(self, name) is not None]:
            raise ConfigError(f"{given[0]} is read only with dataset: files, not with dataset: {self.dataset}")
        if self.text_column == self.summary_column:
            raise ConfigError(f"text_column and summary_column are both {self.text_column!r}; name two columns")
        if "{document}" not in self.prompt_template:
            raise ConfigError(
                f"prompt_template {self.prompt_template!r} has no {{document}}, the place of the text; add it"
            )
        if len(self.adam_betas) != 2:
            raise ConfigError(f"adam_betas needs two numbers, got {self.adam_betas}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        if self.eval_untrained and self.rouge == "never":
            raise ConfigError("eval_untrained scores summaries, so it needs rouge: end or every_eval")
        if "flash_attention" in self.attn_implementation and self.mixed_precision == "no":
            raise ConfigError(f"{self.attn_implementation} cannot compute in float32: set mixed_precision: bf16")
        if self.padding_free and self.attn_implementation not in ("bsa_dense", "bsa_sparse"):
            raise ConfigError(
                f"padding_free needs attn_implementation: bsa_dense or bsa_sparse, not {self.attn_implementation}"
            )

        if self.cuda_graphs and not self.padding_free:
            raise ConfigError("cuda_graphs needs padding_free: true, whose layers have few shapes")

    @property
    def splits(self) -> list[str]:
        """The splits that a run reads, training first."""
        held_out = {self.final_split} | ({"validation"} if self.eval_every else set())
        return ["train", *sorted(held_out)]

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


_TYPES = typing.get_type_hints(Config)
NAMES = tuple(spec.name for spec in fields(Config))
#: Options whose entries can be given one by one, as `--name.entry VALUE`.
MAPPINGS = ("model_config", "block_sparse")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read `path` (YAML), apply `overrides` (name -> value or text; `model_config.x` reaches inside), check all.

    A file with `extends: OTHER` holds its differences from OTHER, whose path is relative to the file's own folder.

    Raises:
        ConfigError: unreadable file, files that extend each other in a circle, unknown name (with the nearest valid
            one), a name given twice, wrong type, value out of range.
    """
    values = _read_options(Path(path))
    for name, value in (overrides or {}).items():
        outer, _, inner = name.partition(".")
        if inner and outer in MAPPINGS:
            values[outer] = {**(_coerce(outer, values.get(outer), _TYPES[outer]) or {}), inner: _from_text(value)}
        else:
            values[name] = value
    for name in values:
        if name not in NAMES:
            raise ConfigError(f"unknown option {name!r}{suggest(str(name), NAMES)}")
    return Config(**{name: _coerce(name, value, _TYPES[name]) for name, value in values.items()})


def _read_options(path: Path, extending: tuple[Path, ...] = ()) -> dict:
    """The options of a file over those of the file that it extends; each option is replaced whole, mappings too.

    `extending` are the files on the way here.
    """
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines")
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends must be the path of a config file, got {base!r}")
    path, target = path.resolve(), (path.parent / base).resolve()
    if target in (*extending, path):
        way = f", by way of {path}" if target != path else ""
        raise ConfigError(f"{target} extends itself{way}; name another file")
    return {**_read_options(target, (*extending, path)), **values}


def _read_yaml(path: str | Path) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        _check_unique(yaml.compose(text, Loader=yaml.SafeLoader), path, set())
        return yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} holds a value that cannot be read: {first_line(error)}") from None


def _check_unique(node: yaml.Node | None, path: str | Path, seen: set[int]) -> None:
    """Raise `ConfigError` where a mapping of the document names a key twice: YAML would take the last."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_unique(item, path, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and (first := lines.setdefault(key.value, line)) != line:
            raise ConfigError(f"{path}: {key.value!r} is given twice, in lines {first} and {line}; keep one of them")
        _check_unique(value, path, seen)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict]:
    """Parse `argv` with the script's own arguments and one `--name VALUE` for each field of `Config`.

    Returns the script's namespace and the overrides for `load_config`. Raises `ConfigError` for unknown options.
    """
    group = parser.add_argument_group("options of the config file (the command line wins)")
    for spec in fields(Config):
        default = spec.default if spec.default is not MISSING else spec.default_factory()
        choices = f" ({', '.join(spec.metadata['choices'])})" if spec.metadata["choices"] else ""
        help_text = f"{spec.metadata['help']}{choices} [{default!r}]".replace("%", "%%")
        group.add_argument(f"--{spec.name}", metavar="VALUE", default=argparse.SUPPRESS, help=help_text)
    namespace, unknown = parser.parse_known_args(argv)
    overrides = {name: vars(namespace).pop(name) for name in NAMES if name in namespace}
    own = [flag.removeprefix("--") for action in parser._actions for flag in action.option_strings]
    while unknown:
        name, separator, value = unknown.pop(0).partition("=")
        key = name.removeprefix("--")
        if not key.startswith(tuple(f"{name}." for name in MAPPINGS)) or not (separator or unknown):
            raise ConfigError(f"unknown argument {name!r}{suggest(key, own, '--')}")
        overrides[key] = value if separator else unknown.pop(0)
    return namespace, overrides


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")


def suggest(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """A question after the nearest valid name, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _from_text(value: Any) -> Any:
    """YAML's reading of command-line text, with `3e-5` a number (YAML 1.1 takes it for a word)."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml.safe_load(value)
        return float(parsed) if isinstance(parsed, str) else parsed
    except (yaml.YAMLError, ValueError):
        return value


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type; text is read where the type is not text."""
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        value = _from_text(value)
        value = value.split(",") if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return [_coerce(name, item, typing.get_args(hint)[0]) for item in value]
    parsed = value if hint is str else _from_text(value)
    if hint is float and isinstance(parsed, int) and not isinstance(parsed, bool):
        try:
            parsed = float(parsed)
        except OverflowError:
            raise ConfigError(f"{name} must be finite, got a number of {len(str(parsed))} digits") from None
    if not isinstance(parsed, hint) or (hint is int and isinstance(parsed, bool)):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}[hint]
        raise ConfigError(f"{name} must be {kind}, got {value!r}")
    return parsed


def _check_limits(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    for item in value if isinstance(value, list) else [value]:
        if limits["choices"] and item not in limits["choices"]:
            raise ConfigError(f"{name} must be one of {', '.join(limits['choices'])}; got {item!r}")
        if not isinstance(item, (int, float)) or isinstance(item, bool):
            continue
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{name} must be finite, got {item}")
        for limit, wrong, words in (
            (limits["low"], lambda x, bound: x < bound, "at least"),
            (limits["above"], lambda x, bound: x <= bound, "above"),
            (limits["below"], lambda x, bound: x >= bound, "below"),
        ):
            if limit is not None and wrong(item, limit):
                raise ConfigError(f"{name} must be {words} {limit}, got {item}")
