"""From any file to documents: text, images and sound in the order in which a reader meets them."""
