"""The ways out of this package and into it: Hugging Face's formats."""
