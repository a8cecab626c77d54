"""The fused loss: equal to Transformers' own in value and gradients, never with logits, and nothing else changed."""

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
import transformers
from packed_models import labelled, losses, widths
from torch import nn
from transformers_models import tiny

from hf_flashbsa import disable_fused_loss, enable_fused_loss, enable_padding_free, fused_loss
from hf_flashbsa.integration import fused_loss as module

pytest.importorskip("liger_kernel", reason="liger-kernel is optional: pip install --no-deps 'liger-kernel>=0.8.5'")
SEQ2SEQ = ("bart", "mbart", "pegasus", "marian", "t5", "mt5")


def biased(name, implementation="bsa_dense", **changes):
    """A tiny model whose `final_logits_bias`, where it has one, is not zero."""
    model = tiny(name, implementation, **changes)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def by_logits(model, inputs, smoothing=0.0, dtype=None):
    """Loss and gradients of the same model by way of its logits."""
    model.zero_grad()
    labels = inputs["labels"]
    with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype is not None):
        logits = model(**inputs).logits
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=smoothing)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(one, other):
    """The largest relative difference, of the losses and of each gradient as a whole.

    Gradients far below the others are rounding alone, as those of the keys' biases, and count against 1/100 of the
    largest.
    """
    assert one[1].keys() == other[1].keys()
    floor = 1e-2 * max(gradient.norm() for gradient in other[1].values())
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in one[1])]
    return max(float((a - b).norm() / b.norm().clamp(min=floor)) for a, b in pairs)


# gemma2's soft cap is beyond Triton's interpreter; the GPU test has it.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", [*SEQ2SEQ, "llama", "qwen3", "gemma"])
def test_loss_and_gradients_are_those_of_the_logits(name, smoothing):
    model, inputs = biased(name), labelled(name, "right")
    expected = by_logits(model, inputs, smoothing)
    enable_fused_loss(model, label_smoothing=smoothing)
    assert distance(losses(model, inputs), expected) < 1e-5
    assert model(**inputs).logits is None


def test_several_pieces_make_the_same_loss():
    """With more labels than words the operator works piece by piece."""
    model, inputs = biased("bart"), labelled("bart", "right", batch=24)
    assert (inputs["labels"] != -100).sum() > model.config.vocab_size
    expected = by_logits(model, inputs, 0.1)
    enable_fused_loss(model, label_smoothing=0.1)
    assert distance(losses(model, inputs), expected) < 1e-5


def test_t5s_scaled_states_and_own_targets():
    model, inputs = biased("t5", tie_word_embeddings=True), labelled("t5", "right")
    del inputs["decoder_input_ids"]
    for scaled in (True, False):
        model.config.scale_decoder_outputs = scaled
        plain = copy.deepcopy(model)
        expected = plain(**inputs).loss
        enable_fused_loss(model)
        torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_with_padding_free_and_checkpointing(name, fused_first):
    model, inputs = biased(name), labelled(name, "right")
    del inputs["decoder_attention_mask"]  # the labels tell
    expected = by_logits(model, inputs)
    steps = [enable_padding_free, enable_fused_loss]
    for step in reversed(steps) if fused_first else steps:
        step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with widths(model) as seen:
        assert distance(losses(model, inputs), expected) < 1e-5
    live = int(inputs["attention_mask"].sum()), int((inputs["labels"] != -100).sum())
    assert {(1, tokens) for tokens in live} == set(seen)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_autocast_rounds_no_more_than_the_logits_would(name):
    model, inputs = biased(name), labelled(name, "right")
    truth, rounded = by_logits(model, inputs), by_logits(model, inputs, dtype=torch.bfloat16)
    enable_fused_loss(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    fused = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    assert loss.dtype == torch.float32
    assert distance(fused, truth) < 2 * distance(rounded, truth)


def test_within_distributed_data_parallel(tmp_path):
    model, inputs = biased("bart"), labelled("bart", "right")
    expected = by_logits(model, inputs)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        enable_fused_loss(wrapped)
        loss, gradients = losses(wrapped, inputs)
    finally:
        torch.distributed.destroy_process_group()
    assert distance((loss, {n.removeprefix("module."): g for n, g in gradients.items()}), expected) < 1e-5


@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_num_items_in_batch_divides_the_sum(name):
    model, inputs = biased(name), labelled(name, "right")
    enable_fused_loss(model)
    labels = inputs["labels"] if name != "llama" else inputs["labels"][:, 1:]
    count = int((labels != -100).sum())
    summed = model(**inputs, num_items_in_batch=1).loss
    torch.testing.assert_close(summed / count, model(**inputs).loss)


def test_without_any_label():
    model, inputs = biased("bart"), labelled("bart", "right")
    enable_fused_loss(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = losses(model, inputs | {"num_items_in_batch": 1})
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())
    assert model(**inputs).loss.isnan()  # as torch's mean of nothing


@pytest.mark.parametrize("return_dict", [True, False])
def test_evaluation_has_no_smoothing_and_makes_logits_unless_told(return_dict):
    model, inputs = biased("bart").eval(), labelled("bart", "right")
    expected = model(**inputs)
    enable_fused_loss(model, label_smoothing=0.5)
    with torch.no_grad():
        whole, short = (model(**inputs, skip_logits=skip, return_dict=return_dict) for skip in (None, True))
    torch.testing.assert_close(whole[0], expected.loss)
    torch.testing.assert_close(whole[1], expected.logits)
    torch.testing.assert_close(short[0], expected.loss)
    vocabulary = model.config.vocab_size
    assert all(x.shape[-1] != vocabulary for x in short[1:] if isinstance(x, torch.Tensor))
    torch.testing.assert_close(short[-1], expected.encoder_last_hidden_state)


def test_training_may_ask_for_logits():
    model, inputs = biased("t5"), labelled("t5", "right")
    expected = by_logits(model, inputs)
    enable_fused_loss(model)
    assert distance(losses(model, inputs | {"skip_logits": False}), expected) < 1e-5
    assert model(**inputs, skip_logits=False).logits.shape[:2] == inputs["labels"].shape


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_labels_by_position(name):
    model, inputs = biased(name), labelled(name, "right")
    expected = by_logits(model, inputs, 0.2)
    enable_fused_loss(model, label_smoothing=0.2)
    names = [*inspect.signature(type(model).forward).parameters][1:]
    call = [inputs.get(key) for key in names[: names.index("labels") + 1]]
    model.zero_grad()
    loss = model(*call).loss
    loss.backward()
    found = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance(found, expected) < 1e-5


def test_concurrent_calls_have_their_own_loss(monkeypatch):
    """`DataParallel` runs replicas, which share their hooks, in threads."""
    model = biased("bart", "sdpa").eval()
    batches = [labelled("bart", "right", batch=batch) for batch in (2, 3)]
    expected = [model(**inputs).loss for inputs in batches]
    enable_fused_loss(model)
    both, one = threading.Barrier(2), threading.Lock()

    def wait(*_):
        both.wait(60)

    model.get_encoder().register_forward_hook(wait)
    plain = module._loss

    def in_turn(*args):  # Triton's interpreter runs one kernel at a time
        with one:
            return plain(*args)

    monkeypatch.setattr(module, "_loss", in_turn)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda inputs: model(**inputs, skip_logits=True).loss, batches))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_logits_in_training_are_warned_of(name, warnings):
    model, inputs = biased(name), labelled(name, "right")
    enable_fused_loss(model)
    model(**inputs).loss.backward()
    labels = inputs.pop("labels")
    with torch.no_grad():
        model(**inputs)
    model.eval()(**inputs)
    model.generate(input_ids=inputs["input_ids"], max_new_tokens=2)
    assert not warnings
    model.train()(**inputs)
    assert len(warnings) == 1 and "called without labels" in warnings[0] and "label_smoothing_factor" in warnings[0]
    if model.config.is_encoder_decoder:
        model.forward(**inputs, labels=labels)
        assert len(warnings) == 2


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_trainers_that_take_the_labels_away_are_warned_of(option, warnings, tmp_path):
    model, inputs = biased("bart", "sdpa"), labelled("bart", "right")
    enable_fused_loss(model)
    smoothing = {option: 0.1} if option == "label_smoothing_factor" else {}
    own = {option: lambda outputs, labels, **_: outputs.logits.sum()} if option == "compute_loss_func" else {}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, **smoothing
    )
    rows = [{key: value[0] for key, value in inputs.items()}]
    transformers.Trainer(model, arguments, train_dataset=rows, **own).train()
    assert warnings and "called without labels" in warnings[0]


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_a_head_replaced_since_is_an_error(name):
    peft = pytest.importorskip("peft")
    model, inputs = biased(name, "sdpa"), labelled(name, "right")
    enable_fused_loss(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="the head of .* was replaced since .*; call enable_fused_loss again"):
        adapted(**inputs)


def test_resized_embeddings_need_it_again():
    model, inputs = biased("bart", "sdpa", tie_word_embeddings=False), labelled("bart", "right")
    enable_fused_loss(model)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    with pytest.raises(ValueError, match="call enable_fused_loss again"):
        model(**inputs)
    expected = model.forward(**inputs).loss  # past the hooks
    enable_fused_loss(model)
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_adapters_within_the_layers(name):
    peft = pytest.importorskip("peft")
    targets = {"bart": ["q_proj", "fc1"], "t5": ["q", "wi"]}[name]
    torch.manual_seed(0)
    model, inputs = biased(name, "sdpa"), labelled(name, "right")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    expected = by_logits(model, inputs, 0.1)
    enable_fused_loss(model, label_smoothing=0.1)
    assert distance(losses(model, inputs), expected) < 1e-5


def test_a_frozen_body_still_trains_the_head():
    model, inputs = biased("bart", tie_word_embeddings=False), labelled("bart", "right")
    model.model.requires_grad_(False)
    expected = by_logits(model, inputs)
    assert expected[1].keys() == {"lm_head.weight"}
    enable_fused_loss(model)
    assert distance(losses(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_calls_without_labels_and_generation_are_untouched(name):
    model, inputs = biased(name).eval(), labelled(name, "left")
    del inputs["labels"]
    prompt = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    before = model(**inputs).logits, model.generate(**prompt, **options)
    enable_fused_loss(model)
    torch.testing.assert_close(model(**inputs).logits, before[0], rtol=0, atol=0)
    assert torch.equal(model.generate(**prompt, **options), before[1])


def test_a_forward_that_raises_leaves_nothing_behind():
    model, inputs = biased("bart").eval(), labelled("bart", "right")
    enable_fused_loss(model)
    with pytest.raises(IndexError):
        model(**(inputs | {"decoder_input_ids": torch.full_like(inputs["decoder_input_ids"], 10**6)}))
    del inputs["labels"]
    assert model(**inputs).logits.shape[1] == inputs["decoder_input_ids"].shape[1]


def test_calling_again_replaces_the_smoothing_and_copies_are_their_own():
    model, inputs = biased("bart"), labelled("bart", "right")
    expected = by_logits(model, inputs, 0.2)
    enable_fused_loss(model, label_smoothing=0.1)
    copied = copy.deepcopy(model)
    enable_fused_loss(model, label_smoothing=0.2)
    assert distance(losses(model, inputs), expected) < 1e-5
    enable_fused_loss(copied, label_smoothing=0.2)
    assert distance(losses(copied, inputs), expected) < 1e-5


class Reworked(transformers.BartForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_what_it_does_not_know_is_an_error():
    config = transformers.BartConfig(**{**tiny("bart", "eager").config.to_dict(), "num_labels": 2})
    for model in (
        tiny("led", "eager"),
        tiny("bert", "eager"),
        tiny("bloom", "eager"),
        Reworked(config),
        transformers.BartForSequenceClassification(config),
        nn.Linear(2, 2),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is not known; known are BartForCond.*Llama"):
            enable_fused_loss(model)
    model = tiny("bart", "eager")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head of BartForConditionalGeneration is a Sequential"):
        enable_fused_loss(model)
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to below 1, got 1"):
        enable_fused_loss(tiny("bart", "eager"), label_smoothing=1)


def test_missing_package_and_missing_gpu_are_named(monkeypatch):
    model = tiny("bart", "eager")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="need a GPU; without one leave it out"):
        enable_fused_loss(model)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps 'liger-kernel>=0.8.5'"):
        enable_fused_loss(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bart", "t5", "gemma2"])
def test_gpu_autocast_and_memory(name):
    """A real vocabulary: no more rounding than with logits, and their memory is not needed."""
    sizes = {"gemma2": {"hidden_size": 256, "final_logit_softcapping": 30.0}}.get(name, {"d_model": 256})
    model = biased(name, "sdpa" if name != "gemma2" else "eager", vocab_size=50265, **sizes).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    inputs = {key: x.cuda() for key, x in labelled(name, "right", batch=64, length=64, target_length=32).items()}

    def peak(step):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return step(), torch.cuda.max_memory_allocated() - held

    truth = by_logits(model, inputs, 0.1)
    rounded, large = peak(lambda: by_logits(model, inputs, 0.1, torch.bfloat16))
    enable_fused_loss(model, label_smoothing=0.1)

    def step():
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    fused, small = peak(step)
    print(f"{name}: peak {large / 2**20:.0f} MiB with logits, {small / 2**20:.0f} MiB fused")
    assert distance(fused, truth) < 2 * distance(rounded, truth)
    assert small < 0.7 * large


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_it_may_be_switched_off_again(name):
    """After which the model is what it was: its own forward, and logits in training."""
    model = tiny(name, "bsa_dense").train()
    inputs = labelled(name, "right")
    before = dict(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)
    wanted = model(**inputs)
    with fused_loss(model):
        assert model(**inputs).logits is None
    enable_fused_loss(model)
    enable_fused_loss(model, label_smoothing=0.1)
    disable_fused_loss(model)
    disable_fused_loss(model)
    got = model(**inputs)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits, wanted.logits)
    assert (dict(vars(model)), len(model._forward_pre_hooks), len(model._forward_hooks)) == before
    assert not model.get_output_embeddings()._forward_pre_hooks
