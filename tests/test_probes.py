"""What a model's code does is found out with texts that are long enough, and with logits that are large enough."""

import pytest
import torch

from architectures import zoo
from dpoctl.errors import InputError
from dpoctl.models import logprobs, packed
from dpoctl.models.probes import can_pack, has_plain_head, probe_length


def alone(model, sequences) -> torch.Tensor:
    """Each text by itself, in float64 where the model's experts can be computed in it."""
    model = model if hasattr(model.config, "num_experts") else model.double()
    sums = []
    with torch.no_grad():
        for ids, start in sequences:
            logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            sums.append(logps[range(start - 1, len(ids) - 1), ids[start:]].sum())
    return torch.stack(sums).double()


def texts(longest: int) -> list[tuple[list[int], int]]:
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(1, 300, (longest + 6,), generator=draw).tolist()
    return [(ids[:longest], 4), ([*ids[:4], *ids[-6:]], 4), (ids[6:12], 2)]


@pytest.mark.parametrize(("longest", "packs"), [(20, True), (21, False), (60, False)])
def test_a_window_that_only_the_mask_knows_is_found_once_texts_are_longer(longest, packs):
    """The window is 20 tokens; the probe costs no more than the texts need."""
    model = zoo.make_model("qwen2-moe", sliding_window=20)
    assert probe_length(model, longest) <= longest
    sequences = texts(longest)
    found = logprobs.summed_logps(model, sequences).detach()
    assert can_pack(model, longest) == packs
    assert torch.allclose(found.double(), alone(model, sequences), atol=2e-4)


def test_packing_is_decided_for_each_length_and_in_any_order():
    """So that a resumed run decides as the whole one did."""
    model = zoo.make_model("qwen2-moe", sliding_window=20)
    first = [can_pack(model, n) for n in (60, 15, 60, 15)]
    assert first == [False, True, False, True]
    sequences = texts(60)
    assert torch.allclose(logprobs.summed_logps(model, sequences).double(), alone(model, sequences), atol=2e-4)


def test_spans_are_read_from_windows_chunks_and_blocks():
    assert probe_length(zoo.make_model("llama"), 100) == 9
    assert 8 < probe_length(zoo.make_model("llama4"), 100) < 20
    assert probe_length(zoo.make_model("mistral", sliding_window=50), 100) > 50
    assert probe_length(zoo.make_model("mistral", sliding_window=50), 40) == 9
    assert probe_length(zoo.make_model("gpt-neo"), 100) > 8


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("llama", {}, True),
        ("llama-tied", {}, True),
        ("opt", {}, True),
        ("gptj", {}, True),  # its head has a bias
        ("gemma2-small-logits", {}, False),  # the largest logit is 0.1 of a cap at 30
        ("gemma2-small-logits", {"final_logit_softcapping": None}, True),
        ("granite", {}, False),
        ("recurrent-gemma", {"logits_soft_cap": 1000.0}, False),
    ],
)
def test_a_cap_of_the_logits_is_found_at_any_size(name, options, plain):
    model = zoo.make_model(name, **options)
    assert has_plain_head(model) == plain
    sequences = texts(20)
    assert torch.allclose(logprobs.summed_logps(model, sequences).double(), alone(model, sequences), atol=2e-4)


def test_an_argument_that_may_change_attention_is_not_ignored():
    _, tree, _, _ = packed.pack(texts(9), 1 << 20, torch.device("cpu"), whole=True)
    states = torch.zeros(1, 2, len(tree.group), 4)
    for name in ("softcap", "s_aux", "something_new"):
        with pytest.raises(ValueError, match=f"attention with {name}"):
            packed.attend(None, states, states, states, None, tree=tree, **{name: 30.0})
    packed.attend(None, states, states, states, None, tree=tree, softcap=None, dropout=0.0)


@pytest.mark.parametrize("pad", [-1, None, 10_000])
def test_padding_needs_no_pad_id_in_the_configuration(pad):
    model = zoo.make_model("gpt-neo")  # always padded
    sequences = texts(20)
    expected = logprobs.summed_logps(model, sequences)
    model.config.pad_token_id = pad
    assert torch.equal(logprobs.summed_logps(model, sequences), expected)
    del model.config.pad_token_id
    assert torch.equal(logprobs.summed_logps(model, sequences), expected)


def test_a_model_that_sees_later_tokens_is_refused():
    """transformers loads XLNet as a causal model; its log-probs of one pass have seen the tokens that they predict."""
    from transformers import XLNetConfig, XLNetLMHeadModel

    torch.manual_seed(0)
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48)).eval()
    with pytest.raises(InputError, match="XLNetLMHeadModel: a token's hidden state depends on the tokens after it"):
        logprobs.summed_logps(model, texts(20))
    for name in ("gpt-neo", "mamba", "llama4", "phi3-longrope"):
        model = zoo.make_model(name)
        model._dpoctl_can_pack = False
        logprobs.summed_logps(model, texts(20))
