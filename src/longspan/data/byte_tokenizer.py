"""The tokenizer of byte-level models: a token is a byte, and its id the byte's value."""

from transformers import PreTrainedTokenizerFast

from longspan.data.splits import SEPARATOR


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes of UTF-8 as ids 0 … 255; the zero byte, which separates documents, begins, ends, pads.

    Bytes that are no UTF-8 decode to U+FFFD.

    >>> byte_tokenizer()("é\\0").input_ids
    [195, 169, 0]
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The pre-tokenizer writes bytes that print nothing as other letters, in the bytes' order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    end = SEPARATOR.decode()
    # The zero byte keeps its own name: it is found as a special token before the others are made.
    vocabulary = {end if byte == 0 else letter: byte for byte, letter in letters.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
