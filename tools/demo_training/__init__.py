"""The parts of ``tools/train_demo_model.py``: tokenizer, batches, network, stages, checkpoints."""
