"""One file per op: the operands of a call, and what people write instead of the op."""
