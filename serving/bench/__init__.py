"""Load for any OpenAI-compatible server: traces replayed or made up, sent on time, and measured from the client's side.

Never imports JAX. `config` holds the settings, `traces` what is asked for and when, `prompts` the words it is asked
with, `client` HTTP, `target` the API, `load` the clock, `summary` and `plot` what came out; `main` runs them.
"""
