"""Mutated files of every format that is read, by the thousand: `python -m tests.fuzz --help`.

mutate.py     changes of bytes, of JSON values, of headers and pickles inside their files
targets.py    a small valid file or folder of each format, and how it is opened
property.py   what must hold of each case, and the process that tries them
"""
