"""One file per op: what people write instead, the operands of a call, the work that it declares."""
