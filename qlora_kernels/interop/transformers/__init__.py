"""Models and folders of Hugging Face transformers."""
