"""Small tools without a subject of their own: errors, files, configs, checkpoints."""
