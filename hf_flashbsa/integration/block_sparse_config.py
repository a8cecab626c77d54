"""Which layout each attention layer of a model uses, as data that is saved with the model."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import torch

from hf_flashbsa.integration.layout_cache import MADE, Pattern, layout_of, name_of
from hf_flashbsa.masks.block_layout import BlockLayout, check_block_size
from hf_flashbsa.masks.modes import ordinary_tensors
from hf_flashbsa.masks.patterns import PATTERNS, has_diagonal, make_layout
from hf_flashbsa.masks.patterns._parameters import check_parameters, unknown
from hf_flashbsa.masks.selection import SELECTIONS

#: Self-attention of an encoder, of a decoder (causal; also that of decoder-only models), and cross-attention.
ROLES = ("encoder", "decoder", "cross")
#: Heads enough to try any rule with.
_MANY_HEADS = 256


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a layer's layout is made: a pattern or a selection by name, or "dense" for no layout.

    `parameters` are sorted pairs, sequences as tuples, so that equal rules compare equal and can be looked up.
    """

    pattern: str
    block_size: int = 128
    parameters: tuple[tuple[str, object], ...] = ()

    @property
    def is_dense(self) -> bool:
        return self.pattern == "dense"

    @property
    def selects(self) -> bool:
        """Whether the layout depends on queries and keys."""
        return self.pattern in SELECTIONS

    @classmethod
    def of(cls, given: str | dict, block_size: int, where: str) -> Rule:
        """The rule that a user wrote: a name, or a dict of `pattern`, perhaps `block_size`, and parameters."""
        given = {"pattern": given} if isinstance(given, str) else given
        if not isinstance(given, dict) or "pattern" not in given:
            raise ValueError(f"{where}: {given!r}; give 'dense' or a dict with 'pattern' and its parameters.")
        rest = {key: value for key, value in given.items() if key not in ("pattern", "block_size")}
        pattern, block_size = given["pattern"], given.get("block_size", block_size)
        try:
            check_block_size(block_size)
            known = {**PATTERNS, **SELECTIONS}
            if pattern == "dense":
                if rest:
                    raise ValueError(f"'dense' has no parameters, {', '.join(sorted(rest))} given.")
            elif not isinstance(pattern, str) or pattern not in known:
                raise ValueError(unknown("pattern", pattern, ["dense", *known]))
            else:
                check_parameters(pattern, known[pattern], rest)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if pattern == "dense":
            return _DENSE
        frozen = ((key, tuple(value) if isinstance(value, list) else value) for key, value in rest.items())
        return cls(pattern, block_size, tuple(sorted(frozen)))

    def check(self, role: str, where: str) -> None:
        """Raises ValueError where this rule cannot serve a role."""
        if self.is_dense:
            return
        if role == "cross" and not self.selects and has_diagonal(self.pattern):
            legal = ["dense", *SELECTIONS, *(name for name in PATTERNS if not has_diagonal(name))]
            raise ValueError(
                f"{where}: {self.pattern!r} follows the diagonal, which cross-attention does not have; give one of "
                f"{', '.join(sorted(legal))}."
            )
        size, options = self.block_size, dict[str, Any](self.parameters)
        try:
            with ordinary_tensors():
                if self.selects:
                    SELECTIONS[self.pattern](*torch.zeros(2, 1, 1, size, 1), size, **options)
                else:
                    sizes = (size, size, size)
                    make_layout(self.pattern, *sizes, causal=role == "decoder", num_heads=_MANY_HEADS, **options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> str | dict:
        if self.is_dense:
            return self.pattern
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in self.parameters}
        return {"pattern": self.pattern, "block_size": self.block_size, **values}


@dataclasses.dataclass(frozen=True, init=False)
class BlockSparseConfig:
    """The block layouts of a model: a default rule, and others for roles and layers.

    ```python
    BlockSparseConfig(
        "longformer", window=512, num_global_tokens=128,
        roles={"decoder": {"pattern": "local", "window": 256}, "cross": "dense"},
        layers={"encoder.0": "dense"},
    )
    ```

    A rule is `"dense"`, or a dict with a `pattern` of `hf_flashbsa.patterns` or a selection of
    `hf_flashbsa.selection`, its parameters, and perhaps a `block_size` of its own. A layer's own rule wins over its
    role's, that over the default; cross-attention without a rule is dense.

    Args:
        pattern: name of the default pattern or selection, or "dense".
        block_size: of rules that name none.
        roles: rules for "encoder", "decoder" (also that of decoder-only models) and "cross".
        layers: rules by role and number of the layer, such as "decoder.3".
        parameters: of the default pattern.

    Raises:
        ValueError: an unknown role, layer, pattern or parameter; a value of the wrong type or out of range; a block
            size that no kernel tile divides; a pattern with a diagonal for cross-attention.
    """

    default: Rule
    roles: dict[str, Rule]
    layers: dict[str, Rule]

    def __init__(
        self,
        pattern: str,
        block_size: int = 128,
        *,
        roles: dict[str, str | dict] | None = None,
        layers: dict[str, str | dict] | None = None,
        **parameters: Any,
    ) -> None:
        default = Rule.of({"pattern": pattern, **parameters}, block_size, "BlockSparseConfig")
        default.check("encoder", "BlockSparseConfig")
        for name, given in (("roles", roles), ("layers", layers)):
            if not isinstance(given or {}, dict):
                raise ValueError(f"{name}: {given!r}; give a dict of rules.")
        by_role, by_layer = {}, {}
        for role, rule in (roles or {}).items():
            if role not in ROLES:
                raise ValueError(f"roles: {unknown('role', role, ROLES)}")
            by_role[role] = Rule.of(rule, block_size, f"roles[{role!r}]")
            by_role[role].check(role, f"roles[{role!r}]")
        for layer, rule in (layers or {}).items():
            role, _, number = str(layer).partition(".")
            if role not in ROLES or not number.isdecimal():
                raise ValueError(f"layers: {layer!r}; give role and number, such as 'encoder.0' or 'cross.3'.")
            name = f"{role}.{int(number)}"
            by_layer[name] = Rule.of(rule, block_size, f"layers[{layer!r}]")
            by_layer[name].check(role, f"layers[{layer!r}]")
        for field, value in (("default", default), ("roles", by_role), ("layers", by_layer)):
            object.__setattr__(self, field, value)

    def rule(self, role: str, layer_index: int | None) -> Rule:
        """The rule of one attention layer; None for a layer without a number."""
        if role not in ROLES:
            raise ValueError(unknown("role", role, ROLES))
        rule = self.layers.get(f"{role}.{layer_index}") or self.roles.get(role)
        return rule or (_DENSE if role == "cross" else self.default)

    def layout(
        self,
        role: str,
        layer_index: int | None,
        num_queries: int,
        num_keys: int,
        num_heads: int,
        device: torch.device | str,
        causal: bool = True,
    ) -> BlockLayout | None:
        """The layout of one attention layer on `device`, or None where it is dense.

        Layouts are made once for a rule and a number of blocks, and shared by all layers with equal rules. Those of a
        decoder need as many queries as keys.

        Args:
            causal: of a decoder, whether its mask hides all later keys. Where it may show some, the layout has blocks
                above the diagonal as well: those of the pattern's bidirectional form.

        Raises:
            ValueError: the rule selects blocks by queries and keys; see `select`.
        """
        rule = self.rule(role, layer_index)
        if rule.is_dense:
            return None
        if rule.selects:
            raise ValueError(f"{rule.pattern} needs queries and keys; call select(), not layout().")
        if role == "decoder" and num_queries != num_keys:
            raise ValueError(f"A decoder's layout needs as many queries as keys, got {num_queries} and {num_keys}.")
        rows, columns = ((length + rule.block_size - 1) // rule.block_size for length in (num_queries, num_keys))
        form = "bidirectional" if role != "decoder" else "causal" if causal else "joined"
        pattern = Pattern(rule.pattern, rule.block_size, rule.parameters, form, int(num_heads))
        return layout_of(pattern, rows, columns, torch.device(device))

    def select(
        self,
        role: str,
        layer_index: int | None,
        q: torch.Tensor,
        k: torch.Tensor,
        live_q: torch.Tensor | None = None,
        live_k: torch.Tensor | None = None,
        causal: bool = True,
        shown: torch.Tensor | None = None,
    ) -> BlockLayout:
        """The layout that a selecting rule chooses for these queries and keys; arguments as in `layout` and
        `hf_flashbsa.selection`."""
        rule = self.rule(role, layer_index)
        if not rule.selects:
            raise ValueError(f"{rule.pattern} does not depend on queries and keys; call layout(), not select().")
        causal, diagonal = causal and role == "decoder", role != "cross"
        choose = SELECTIONS[rule.pattern]
        return choose(q, k, rule.block_size, causal, diagonal, live_q, live_k, shown, **dict(rule.parameters))

    def to_dict(self) -> dict:
        """The arguments that make this config again, as JSON can hold them."""
        default = self.default.to_dict()
        fields = dict(default) if isinstance(default, dict) else {"pattern": default}
        # Rules name their block size, so what is left to inherit is the default rule's.
        for name, rules in (("roles", self.roles), ("layers", self.layers)):
            if rules:
                fields[name] = {key: rule.to_dict() for key, rule in rules.items()}
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> BlockSparseConfig:
        """The config that `to_dict` wrote."""
        if not isinstance(fields, dict) or "pattern" not in fields:
            raise ValueError(f"block_sparse: {fields!r}; give the dict of BlockSparseConfig.to_dict().")
        return cls(**fields)

    @classmethod
    def of(cls, model_config: object) -> BlockSparseConfig:
        """The config that `set_block_sparse` stored in a Transformers config. Read once for equal dicts.

        Raises:
            ValueError: there is none.
        """
        fields = getattr(model_config, "block_sparse", None)
        if fields is None:
            raise ValueError(
                f"bsa_sparse: {type(model_config).__name__} has no block layout. Give one with "
                "hf_flashbsa.set_block_sparse(model, BlockSparseConfig('longformer', window=512, "
                "num_global_tokens=128)), or use attn_implementation='bsa_dense'."
            )
        return getattr(MADE, _name_of_config(repr(fields)))


_DENSE = Rule("dense")


@torch.compiler.assume_constant_result
def _name_of_config(fields: str) -> str:
    """Which attribute of `MADE` is the config of the dict with this `repr`, a constant to torch.compile."""
    return name_of(fields, lambda: BlockSparseConfig.from_dict(ast.literal_eval(fields)))
