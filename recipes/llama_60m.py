"""A Llama of 60M parameters for tokens of a `tokenizer.json` of 32,000: the shape that the benchmarks measure.

`twinax train recipes/llama_60m.py --data.path FOLDER --data.tokenizer tokenizer.json`
"""

from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig

recipe = Recipe(
    model=ModelConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_layers=14,
        num_heads=8,
        num_kv_heads=4,
        tie_embeddings=True,
        max_position_embeddings=2048,
    ),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig(name="wsd", warmup_steps=200, decay_steps=2000),
    checkpoint=CheckpointConfig(every=500, keep_every=5000),
    eval=EvalConfig(every=500, batches=32),
    steps=10000,
    batch_size=8,
    sequence_length=512,
    output="runs/llama_60m",
)
