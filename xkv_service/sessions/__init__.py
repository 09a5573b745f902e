"""Conversations over one prefix, compressed or exact: messages in, text out, the tail kept between turns."""
