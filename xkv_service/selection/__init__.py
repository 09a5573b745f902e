"""What lets decoding find the tokens worth rebuilding: sketches, landmarks, and the tokens kept exact."""
