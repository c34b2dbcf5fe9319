"""Token ids as text, token by token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT_CHARACTER = "�"  # what decoders write for bytes that are no complete character


def pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text that each token adds, special tokens included; joined, they are the text of all.

    A token that ends within a character adds nothing: the token that completes it adds the character. Where a decoder
    writes earlier text differently once a token follows, the token's name in the vocabulary stands for it.
    """
    found: list[str] = []
    begin = 0  # decoding starts here: with the tokens of the last piece, since a text's first token may lose its space
    read = 0  # up to here, all text is in `found`
    for n in range(len(ids)):
        before, text = _text(tokenizer, ids[begin:read]), _text(tokenizer, ids[begin : n + 1])
        if text.endswith(_CUT_CHARACTER) and n + 1 < len(ids):
            found.append("")
        elif text.startswith(before):
            found.append(text[len(before) :])
            begin, read = read, n + 1
        else:
            found.append(str(tokenizer.convert_ids_to_tokens(ids[n])))
            begin, read = n, n + 1
    return found


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
