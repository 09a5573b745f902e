"""What a calibration's report is made of: figures read with care, charts, and two ways to draw them."""
