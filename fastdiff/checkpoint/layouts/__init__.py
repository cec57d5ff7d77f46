"""The layouts of checkpoints, one per file or folder of this package.

A layout is the `LAYOUT` of its module, a `checkpoint.open.Layout`. It defines the marks by which it
is recognised, reads a checkpoint into a `Model`, and may write one. `checkpoint.open.layouts` finds
all of them in the order of their names, so a new layout is one new file. Files without a `LAYOUT`
are helpers.
"""
