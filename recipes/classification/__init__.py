"""Classification of images, texts and rows of tables."""
