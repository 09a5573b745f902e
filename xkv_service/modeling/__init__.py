"""What a Transformers model caches, how it rotates keys, where its files are, and how it renders a chat."""
