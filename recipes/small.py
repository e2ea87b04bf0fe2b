"""A byte-level Llama of 3M parameters, minutes on two CPU cores: `twinax train recipes/small.py --data.path FOLDER`."""

from twinax.train.recipe import CheckpointConfig, EvalConfig, ModelConfig, OptimizerConfig, Recipe, ScheduleConfig

recipe = Recipe(
    model=ModelConfig(
        hidden_size=256, intermediate_size=704, num_layers=4, num_heads=8, num_kv_heads=4, max_position_embeddings=1024
    ),
    optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1),
    schedule=ScheduleConfig(name="cosine", warmup_steps=20),
    checkpoint=CheckpointConfig(every=50),
    eval=EvalConfig(every=50, batches=8),
    steps=300,
    batch_size=16,
    sequence_length=256,
    output="runs/small",
)
