"""The HTTP server: `server.serve` runs it; the engine runs in a process of its own (`serving/engine_process.py`).

- `config`, `server`, `launch`, `running`: settings, start and end of the two processes;
- `app`: routes, the API key, disconnects;
- `fields`, `body`, `errors`: what a request may say, and the errors for all it may not;
- `completions`, `chat`, `choices`, `tokenize`: requests to the engine, outputs to answers;
- `engine_client`, `metrics`, `service`: the way to the engine, and what is measured;
- `engine_life`, `generation`, `restarts`: an engine process, requests that outlive it, when another one is started;
- `admin`, `unix`: what an administrator may do, on a socket of its own.

Nothing here imports JAX.
"""
