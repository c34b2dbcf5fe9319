"""A chat model in miniature that gives one answer to whatever it is asked."""

from pathlib import Path

import torch

from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import chat


def save_judge(folder: Path, *answer: str, context: int = 1024, rival: str = "") -> None:
    """A Llama whose next token depends on the last one alone: after a request come the tokens `answer` and the end.

    `rival` is nearly as probable as the last token of the answer. Heads are of 32: vLLM's kernels for processors have
    no smaller ones.
    """
    tokenizer = chat()
    tokenizer.add_tokens([*answer, *([rival] if rival else [])])
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    model = tiny_model("llama", vocab=len(tokenizer), context=context, width=64, heads=2, **ids)
    start = tokenizer("assistant\n", add_special_tokens=False).input_ids[-1]  # the last token of a chat's prompt
    chain = [start, *tokenizer.convert_tokens_to_ids(list(answer)), tokenizer.eos_token_id]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded, head = model.get_input_embeddings().weight, model.lm_head.weight
        head.zero_()
        for token, following in zip(chain, chain[1:], strict=False):
            head[following] = 3.0 * embedded[token]
        if rival:
            head[tokenizer.convert_tokens_to_ids(rival)] = 2.97 * embedded[chain[-3]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
