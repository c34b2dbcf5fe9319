"""What the tests share: the miniature world, fault injection, a judge that answers over HTTP, families of tokenizers."""
