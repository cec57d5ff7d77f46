"""The layouts of checkpoints: each file or folder of this room is one.

A layout is the `LAYOUT` of its module, a `checkpoint.open.Layout`: it says by marks what it
recognises, reads it into a `Model`, and may write a `Model`. `checkpoint.open.layouts` finds all of
them, in the order of their names, so a new one is one new file. Files here without a `LAYOUT` help
others.
"""
