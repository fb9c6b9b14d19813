"""The data sets and the pretrained backbones, from published packages or the user's files."""
