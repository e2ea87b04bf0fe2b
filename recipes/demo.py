"""The byte-level Llama that `make demo` trains: two minutes on two CPU cores."""

from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig

recipe = Recipe(
    model=ModelConfig(
        hidden_size=192, intermediate_size=512, num_layers=4, num_heads=6, num_kv_heads=3, max_position_embeddings=1024
    ),
    optimizer=OptimizerConfig(lr=4e-3),
    schedule=ScheduleConfig(name="cosine", warmup_steps=20),
    checkpoint=CheckpointConfig(every=100),
    eval=EvalConfig(every=100, batches=8),
    steps=240,
    batch_size=8,
    sequence_length=256,
    output="runs/demo/run",
)
