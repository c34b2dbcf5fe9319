"""What tests share: the miniature world, fault injection, a judge behind HTTP, small tokenizers and models."""
