"""`BlockSparseConfig`: which rule a layer gets, the layouts it leads to, storage with a model, and errors."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter

from hf_flashbsa.integration import layout_cache
from hf_flashbsa.integration.block_sparse_config import BlockSparseConfig, Rule
from hf_flashbsa.integration.sparse_layers import set_block_sparse
from hf_flashbsa.patterns import make_layout
from hf_flashbsa.selection import top_k_blocks

CPU = torch.device("cpu")
MIXED = {
    "pattern": "longformer",
    "block_size": 64,
    "window": 128,
    "num_global_tokens": 32,
    "roles": {
        "decoder": {"pattern": "dilated", "window": 8, "dilation": [1, 2], "block_size": 32},
        "cross": {"pattern": "top_k_blocks", "top_k": 2},
    },
    "layers": {"encoder.0": "dense", "decoder.3": {"pattern": "bigbird", "seed": 3}, "cross.1": "dense"},
}


def test_the_narrowest_rule_wins():
    config = BlockSparseConfig(**MIXED)
    longformer = Rule("longformer", 64, (("num_global_tokens", 32), ("window", 128)))
    dilated = Rule("dilated", 32, (("dilation", (1, 2)), ("window", 8)))
    assert config.rule("encoder", 0).is_dense
    assert config.rule("encoder", 1) == longformer
    assert config.rule("decoder", 0) == dilated
    assert config.rule("decoder", 3) == Rule("bigbird", 64, (("seed", 3),))
    assert config.rule("cross", 0) == Rule("top_k_blocks", 64, (("top_k", 2),))
    assert config.rule("cross", 1).is_dense


def test_cross_attention_is_dense_unless_it_has_a_rule():
    config = BlockSparseConfig("local", window=5)
    assert config.rule("cross", 0).is_dense
    assert config.layout("cross", 0, 64, 200, 4, CPU) is None
    config = BlockSparseConfig(
        "local", window=5, roles={"cross": {"pattern": "global_columns", "num_global_tokens": 9}}
    )
    expected = make_layout("global_columns", 128, 256, num_global_tokens=9)
    assert config.layout("cross", 0, 64, 200, 4, CPU).equals(expected)


def test_layouts_have_the_role_s_causality_and_the_rule_s_block_size():
    config = BlockSparseConfig(**MIXED)
    encoder = make_layout("longformer", 192, 192, 64, window=128, num_global_tokens=32)
    decoder = make_layout("dilated", 160, 160, 32, window=8, dilation=[1, 2], causal=True, num_heads=4)
    assert config.layout("encoder", 1, 150, 150, 4, CPU).equals(encoder)
    assert config.layout("decoder", 0, 150, 150, 4, CPU).equals(decoder)
    assert config.layout("encoder", 0, 150, 150, 4, CPU) is None


def test_equal_rules_and_sizes_share_one_layout():
    config, other = BlockSparseConfig(**MIXED), BlockSparseConfig("longformer", 64, window=128, num_global_tokens=32)
    layout = config.layout("encoder", 1, 150, 150, 4, CPU)
    assert config.layout("encoder", 2, 150, 150, 4, "cpu") is layout
    assert config.layout("encoder", 1, 140, 192, 4, CPU) is layout
    assert other.layout("encoder", 0, 150, 150, 4, CPU) is layout
    assert config.layout("encoder", 1, 193, 193, 4, CPU) is not layout
    assert config.layout("encoder", 1, 150, 150, 4, "meta") is layout.to("meta")


def test_layouts_made_by_two_threads_at_once(monkeypatch):
    one, other = (BlockSparseConfig("local", 32, window=window) for window in (3, 61))
    arguments = ("encoder", 0, 320, 320, 4, CPU)
    threads = ["one"]

    def interrupted(target: object, name: str, value: object) -> None:
        setattr(target, name, value)
        if len(threads) == 1:
            threads.append("other")
            other.layout(*arguments)

    monkeypatch.setattr(layout_cache, "setattr", interrupted, raising=False)
    for config, window in ((one, 3), (other, 61)):
        assert config.layout(*arguments).equals(make_layout("local", 320, 320, 32, window=window))
    assert threads == ["one", "other"]


def test_a_selecting_rule_chooses_by_role():
    rule = {"pattern": "top_k_blocks", "top_k": 1, "block_size": 32}
    config = BlockSparseConfig("dense", roles=dict.fromkeys(("encoder", "decoder", "cross"), rule))
    q, k = torch.randn(2, 2, 2, 100, 4, generator=torch.Generator().manual_seed(0))
    live = torch.tensor([100, 40])
    for role, options in (("encoder", (False, True)), ("decoder", (True, True)), ("cross", (False, False))):
        expected = top_k_blocks(q, k, 32, *options, None, live, top_k=1)
        assert config.select(role, 0, q, k, live_k=live).equals(expected)
    with pytest.raises(ValueError, match="call select"):
        config.layout("encoder", 0, 100, 100, 2, CPU)
    with pytest.raises(ValueError, match="call layout"):
        BlockSparseConfig("local", window=1).select("encoder", 0, q, k)


@pytest.mark.parametrize(
    "fields", [MIXED, {"pattern": "dense"}, {"pattern": "deepspeed_variable", "global_blocks": [1]}]
)
def test_json_round_trip(fields):
    config = BlockSparseConfig(**fields)
    text = json.dumps(config.to_dict())
    assert BlockSparseConfig.from_dict(json.loads(text)) == config
    assert json.loads(text)["pattern"] == fields["pattern"]


def test_a_dense_default_keeps_no_block_size():
    config = BlockSparseConfig("dense", 32, roles={"encoder": {"pattern": "local", "window": 3}})
    assert BlockSparseConfig.from_dict(config.to_dict()) == config
    assert config.rule("encoder", 0).block_size == 32


SIZE = dict(vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **SIZE, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_with_the_model(name, tmp_path):
    model, config = MODELS[name](), BlockSparseConfig(**MIXED)
    set_block_sparse(model, config)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert BlockSparseConfig.of(loaded.config) == config
    held = [module.config for module in loaded.modules() if hasattr(module, "config")]
    assert len(held) > 3
    assert all(BlockSparseConfig.of(c) == config for c in held)
    assert BlockSparseConfig.of(transformers.AutoConfig.from_pretrained(tmp_path)) == config


@pytest.mark.parametrize("name", MODELS)
def test_every_config_that_layers_see_is_written(name):
    model = MODELS[name]()
    set_block_sparse(model, BlockSparseConfig("local", window=3))
    set_block_sparse(model, BlockSparseConfig("local", window=5))
    held = [module.config for module in model.modules() if hasattr(module, "config")]
    assert all(BlockSparseConfig.of(c).default.parameters == (("window", 5),) for c in held)


def test_a_stored_config_is_read_once_and_again_when_it_changes():
    model_config = transformers.LlamaConfig(block_sparse=BlockSparseConfig("local", window=3).to_dict())
    first = BlockSparseConfig.of(model_config)
    assert BlockSparseConfig.of(model_config) is first
    model_config.block_sparse["window"] = 5
    assert BlockSparseConfig.of(model_config).default.parameters == (("window", 5),)


def test_compiled_code_has_one_graph_for_all_numbers_of_blocks():
    model_config = transformers.LlamaConfig(block_sparse={"pattern": "local", "block_size": 32, "window": 40})

    def visited(x: torch.Tensor) -> torch.Tensor:
        config = BlockSparseConfig.of(model_config)
        layouts = [config.layout("encoder", i, len(x), len(x), 1, x.device) for i in range(2)]
        return x + sum(layout.lists("q").total.sum() for layout in layouts)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(visited, backend=counter, fullgraph=True)
    for length in (100, 110, 128, 300, 290, 650):
        assert torch.equal(compiled(torch.zeros(length)), visited(torch.zeros(length)))
    assert counter.frame_count == 2, "one for the first length, one for any"


def test_compiled_code_selects():
    config = BlockSparseConfig("top_k_blocks", 32, top_k=2)

    def visited(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        lists = config.select("decoder", 0, q, k).lists("q")
        return lists.total + lists.index[..., 0]

    q, k = torch.randn(2, 1, 2, 100, 4, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(visited, backend="eager", fullgraph=True)(q, k), visited(q, k))


def test_a_model_without_a_config():
    with pytest.raises(
        ValueError, match=r"LlamaConfig has no block layout. Give one with hf_flashbsa.set_block_sparse\("
    ):
        BlockSparseConfig.of(transformers.LlamaConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": "longfromer"},
            "BlockSparseConfig: Unknown pattern .*; did you mean 'longformer'.*dense",
        ),
        ({"pattern": ["local"]}, "Unknown pattern"),
        ({"pattern": "local", "windw": 3}, "Unknown parameter of 'local': 'windw'; did you mean 'window'"),
        ({"pattern": "local"}, "local: needs window"),
        ({"pattern": "local", "window": "3"}, "local: window is '3'; give int"),
        ({"pattern": "local", "window": -3}, "BlockSparseConfig: window: -3; give at least 0"),
        ({"pattern": "top_k_blocks", "top_k": 0}, "BlockSparseConfig: top_k: 0"),
        ({"pattern": "antidiagonal_blocks", "stride": 24}, "does not divide the block size 128"),
        ({"pattern": "antidiagonal_blocks", "threshold": "x"}, "threshold is 'x'; give float"),
        ({"pattern": "dense", "window": 3}, "'dense' has no parameters, window given"),
        ({"pattern": "all_blocks", "block_size": 100}, "no kernel tile divides 100"),
        ({"pattern": "all_blocks", "roles": {"encodr": "dense"}}, "Unknown role 'encodr'; did you mean 'encoder'"),
        ({"pattern": "all_blocks", "roles": ["encoder"]}, r"roles: \['encoder'\]; give a dict of rules"),
        ({"pattern": "all_blocks", "roles": {"encoder": 3}}, r"roles\['encoder'\]: 3; give 'dense' or a dict"),
        ({"pattern": "all_blocks", "roles": {"encoder": {"window": 3}}}, "give 'dense' or a dict with 'pattern'"),
        ({"pattern": "all_blocks", "roles": {"encoder": "local"}}, r"roles\['encoder'\]: local: needs window"),
        (
            {"pattern": "all_blocks", "roles": {"cross": {"pattern": "local", "window": 3}}},
            "'local' follows the diagonal.* give one of all_blocks, antidiagonal_blocks, dense, global_columns, top_k",
        ),
        (
            {"pattern": "all_blocks", "roles": {"decoder": {"pattern": "deepspeed_fixed", "horizontal": True}}},
            r"roles\['decoder'\]: horizontal",
        ),
        ({"pattern": "all_blocks", "layers": {"3": "dense"}}, "layers: '3'; give role and number"),
        ({"pattern": "all_blocks", "layers": {"encoder.x": "dense"}}, "give role and number"),
        ({"pattern": "all_blocks", "layers": {"cross.0": {"pattern": "butterfly"}}}, r"layers\['cross.0'\]"),
    ],
)
def test_wrong_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockSparseConfig(**fields)


def test_wrong_calls():
    config = BlockSparseConfig("dilated", window=4, dilation=[1, 2, 3])
    with pytest.raises(ValueError, match="Unknown role 'self'"):
        config.layout("self", 0, 10, 10, 4, CPU)
    with pytest.raises(ValueError, match="as many queries as keys, got 10 and 11"):
        config.layout("decoder", 0, 10, 11, 4, CPU)
    with pytest.raises(ValueError, match="3 variants for num_heads=2"):
        config.layout("encoder", 0, 10, 10, 2, CPU)
    with pytest.raises(ValueError, match="give a BlockSparseConfig"):
        set_block_sparse(torch.nn.Linear(1, 1), config.to_dict())
    with pytest.raises(ValueError, match="give the dict of"):
        BlockSparseConfig.from_dict({"window": 3})
