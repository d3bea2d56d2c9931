"""Small models, model folders and fine-tuning runs."""
