"""What a trained run is worth: held-out loss of any text, and text that it writes."""
