"""Jobs: the images of millions of rows, in shards that are whole or not there.

    spec = JobSpec(rows="rows.jsonl", model="digits", out=Path("out/job"), shard_size=20)
    summary = run_job(spec)            run again, it resumes

rows.py         rows from text, CSV, JSONL, Parquet, webdataset, as a stream
fields.py       a row's columns -> the fields of a job
worker.py       shards one after another, the slots always full
shards.py       shards and their errors, and locks on them
store.py        a folder or an object store
processes.py    several workers on one machine, replaced when they die
cluster.py      the same on Ray
settle.py       what a job settles when it begins
fingerprint.py  what must be equal for a job to be resumed
pictures.py     hashes of the pictures that rows name
"""

from __future__ import annotations

from fastdiff.jobs.run import Status, Summary, run_job
from fastdiff.jobs.spec import JobSpec, read_job

__all__ = ["JobSpec", "Status", "Summary", "read_job", "run_job"]
