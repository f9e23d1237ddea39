"""Classification of images and texts."""
