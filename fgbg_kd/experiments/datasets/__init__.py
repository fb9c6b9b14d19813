"""The embedded data sets and a pretrained backbone, made from files in published packages."""
