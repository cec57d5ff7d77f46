"""Kills, two processes in one folder, and full disks: `python -m tests.endure --help`.

child.py      work in a process of its own, and how it is killed
folders.py    what must hold of a folder after a kill and at the end
work.py       the work that is killed: training, sampling, jobs, saving
kills.py      killed and gone on with until it is done
pairs.py      two processes at the same time
disks.py      a disk that is full
"""
