"""From a folder of images to scores with intervals."""
