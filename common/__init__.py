"""Code that recipes share; it never imports a recipe."""
