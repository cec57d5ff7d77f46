"""The server: OpenAI's image endpoints in front of the slot engine.

http.py      uvicorn: connections, slow clients, signals, draining
app.py       Starlette: routes, keys, bodies, responses, streams
schema.py    the fields of a body -> jobs; every other field is refused
uploads.py   multipart bodies; decoder.py decodes their pictures in a process of limited memory
worker.py    the thread that owns the model: queue -> engines -> decoder of latents
queue.py     which image is next: fair between long and short requests
metrics.py   what Prometheus reads

Nothing is imported here: `fastdiff serve --help` needs neither torch nor Starlette.
"""
