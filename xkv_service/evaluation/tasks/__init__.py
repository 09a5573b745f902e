"""What is asked about a prefix: RULER's tasks written anew and the bundled model's own, one family a file."""
